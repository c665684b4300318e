//! What a run prints, in the columns of nccl-tests, and the file it writes.

use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::PathBuf;

use serde::Serialize;

use crate::Error;
use crate::machine::Machine;
use crate::operation::Form;
use crate::overlap::Overlap;
use crate::roofline::Roofline;
use crate::timing::Summary;

/// One form of an operation at one size.
#[derive(Clone, Debug, Serialize)]
pub struct Measurement {
    /// The operation's name.
    pub op: &'static str,
    /// Type of its elements, or `none`.
    pub dtype: &'static str,
    /// How they are combined, or `none`.
    pub redop: &'static str,
    /// The root, or −1.
    pub root: i64,
    /// Bytes, as nccl-tests counts them.
    pub size: usize,
    /// Elements of a part, or of the buffer where there are no parts.
    pub count: usize,
    /// Number of ranks.
    pub ranks: usize,
    /// What moved the bytes.
    pub backend: String,
    /// Number of hosts.
    pub hosts: usize,
    /// Whether it ran in one buffer.
    pub in_place: bool,
    /// Where the buffers lay: `arena`, `private`, `window` or `none`.
    pub buffers: &'static str,
    /// Percentiles of the samples.
    #[serde(flatten)]
    pub time: Summary,
    /// Size over median time, in 10⁹ bytes a second.
    pub algbw: f64,
    /// That times the operation's bus factor.
    pub busbw: f64,
    /// The memory roofline, where bytes move.
    pub roofline: Option<Roofline>,
    /// The roofline's time as a share of the operation's.
    pub roofline_percent: Option<f64>,
    /// Overlap, where it was asked for and can be.
    pub overlap: Option<Overlap>,
    /// Wrong elements over all ranks, where they were looked for.
    pub wrong: Option<u64>,
    /// Time of each iteration.
    pub samples_us: Vec<f64>,
}

/// The file of a run.
#[derive(Serialize)]
struct Document<'a> {
    machine: &'a Machine,
    command: &'a [String],
    results: &'a [Measurement],
}

/// Where results go on rank 0; nowhere on others.
pub struct Report {
    file: Option<(PathBuf, File)>,
    results: Vec<Measurement>,
    silent: bool,
}

impl Report {
    /// Opens the file, if there is to be one, so that a wrong path fails before the measurement. `silent` on ranks other than 0.
    ///
    /// # Errors
    /// [`Error::Output`].
    pub fn new(json: Option<PathBuf>, silent: bool) -> Result<Report, Error> {
        let file = match json.filter(|_| !silent) {
            Some(path) => {
                // An earlier file stays as it is until there is something to replace it.
                let open = File::options().write(true).create(true).truncate(false).open(&path);
                let file = open.map_err(Error::file(&path))?;
                Some((path, file))
            }
            None => None,
        };
        Ok(Report { file, results: Vec::new(), silent })
    }

    /// Prints lines that are no results.
    ///
    /// # Errors
    /// [`Error::Output`].
    pub fn comment(&mut self, text: &str) -> Result<(), Error> {
        self.print(text.lines().map(|line| format!("# {line}")))
    }

    /// Prints the head of an operation's table.
    ///
    /// # Errors
    /// [`Error::Output`].
    pub fn heading(&mut self, name: &str, forms: &[Form], overlap: bool) -> Result<(), Error> {
        let each = |text: &dyn Fn(&Form) -> String| forms.iter().map(text).collect::<String>();
        let title = |form: &Form| match form {
            Form::OutOfPlace => "out-of-place",
            Form::InPlace => "in-place",
        };
        let own = |three: [&str; 4]| {
            if overlap { three.map(|name| format!("{name:>9}")).concat() } else { String::new() }
        };
        self.print([
            String::new(),
            format!("# {name}"),
            format!("#{:46}{}", "", each(&|form| format!("{:>70}", format!("{:-^68}", format!(" {} ", title(form)))))),
            format!(
                "#{:>11} {:>11} {:>6} {:>7} {:>6}  {}{}",
                "size",
                "count",
                "type",
                "redop",
                "root",
                each(&|_| {
                    format!(
                        "{:>10} {:>7} {:>7} {:>7} {:>10} {:>10} {:>10} {:>6} ",
                        "time", "algbw", "busbw", "#wrong", "p95", "p99", "min", "%mem"
                    )
                }),
                own(["overall", "compute", "pure", "%hidden"])
            ),
            format!(
                "#{:>11} {:>11} {:>6} {:>7} {:>6}  {}{}",
                "(B)",
                "(elements)",
                "",
                "",
                "",
                each(&|_| {
                    format!(
                        "{:>10} {:>7} {:>7} {:>7} {:>10} {:>10} {:>10} {:>6} ",
                        "(us)", "(GB/s)", "(GB/s)", "", "(us)", "(us)", "(us)", ""
                    )
                }),
                own(["(us)", "(us)", "(us)", ""])
            ),
        ])
    }

    /// Prints a line: the forms of one operation at one size, and keeps it for the file.
    ///
    /// # Errors
    /// [`Error::Output`].
    pub fn line(&mut self, forms: Vec<Measurement>) -> Result<(), Error> {
        let Some(first) = forms.first() else { return Ok(()) };
        let mut line = format!(
            " {:>11} {:>11} {:>6} {:>7} {:>6}  ",
            first.size, first.count, first.dtype, first.redop, first.root
        );
        for form in &forms {
            let not_known = || "N/A".to_string();
            line += &format!(
                "{:>10} {:>7.2} {:>7.2} {:>7} {:>10} {:>10} {:>10} {:>6} ",
                micros(form.time.p50_us),
                form.algbw,
                form.busbw,
                form.wrong.map_or_else(not_known, |wrong| wrong.to_string()),
                micros(form.time.p95_us),
                micros(form.time.p99_us),
                micros(form.time.min_us),
                form.roofline_percent.map_or_else(not_known, |percent| format!("{percent:.0}")),
            );
        }
        if let Some(overlap) = &first.overlap {
            for time in [overlap.overall_us, overlap.compute_us, overlap.pure_us] {
                line += &format!("{:>9}", micros(time));
            }
            line += &format!("{:>9.0}", overlap.hidden_percent);
        }
        self.results.extend(forms);
        self.print([line.trim_end().to_string()])
    }

    /// Prints the sums that nccl-tests prints last, and writes the file.
    ///
    /// # Errors
    /// [`Error::Output`].
    pub fn finish(&mut self, machine: &Machine, command: &[String]) -> Result<(), Error> {
        let moved: Vec<f64> = self.results.iter().map(|form| form.busbw).filter(|&busbw| busbw > 0.0).collect();
        let wrong: Option<u64> = self.results.iter().filter_map(|form| form.wrong).reduce(|a, b| a + b);
        let mean = moved.iter().sum::<f64>() / moved.len().max(1) as f64;
        let verdict = match wrong {
            Some(0) => "0 OK".into(),
            Some(wrong) => format!("{wrong} FAILED"),
            None => "N/A (not looked for without --check)".into(),
        };
        self.print([
            String::new(),
            format!("# Out of bounds values : {verdict}"),
            format!("# Avg bus bandwidth    : {mean:.4}"),
        ])?;
        if let Some((path, file)) = self.file.take() {
            let document = Document { machine, command, results: &self.results };
            if file.metadata().is_ok_and(|metadata| metadata.is_file()) {
                file.set_len(0).map_err(Error::file(&path))?;
            }
            let mut file = BufWriter::new(file);
            let written = serde_json::to_writer_pretty(&mut file, &document).map_err(std::io::Error::from);
            written.and_then(|()| file.flush()).map_err(Error::file(&path))?;
        }
        Ok(())
    }

    fn print(&self, lines: impl IntoIterator<Item = String>) -> Result<(), Error> {
        if self.silent {
            return Ok(());
        }
        let text = lines.into_iter().map(|line| line + "\n").collect::<String>();
        let mut out = std::io::stdout().lock();
        let written = out.write_all(text.as_bytes()).and_then(|()| out.flush());
        written.map_err(|source| Error::Output { what: "to standard output".into(), source })
    }
}

/// Microseconds with as many digits as nccl-tests gives them.
fn micros(time: f64) -> String {
    match time {
        _ if time < 10_000.0 => format!("{time:.2}"),
        _ if time < 100_000.0 => format!("{time:.1}"),
        _ => format!("{time:.0}"),
    }
}
