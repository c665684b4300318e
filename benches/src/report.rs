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
    /// What moved the bytes; `mpi library: ` and its name for the library that ours is compared with.
    pub backend: String,
    /// The function of that library.
    pub call: Option<&'static str>,
    /// Number of hosts.
    pub hosts: usize,
    /// Whether it ran in one buffer.
    pub in_place: bool,
    /// Where the buffers lay: `arena`, `private`, `window` or `none`.
    pub buffers: &'static str,
    /// How long it took, and what follows from that.
    #[serde(flatten)]
    pub times: Times,
    /// The memory roofline, where bytes move.
    pub roofline: Option<Roofline>,
    /// Overlap, where it was asked for and can be.
    pub overlap: Option<Overlap>,
    /// Wrong elements over all ranks, where they were looked for.
    pub wrong: Option<u64>,
}

/// How long an operation took, and what follows from that.
#[derive(Clone, Debug, Serialize)]
pub struct Times {
    /// Percentiles of the samples.
    #[serde(flatten)]
    pub time: Summary,
    /// Size over median time, in 10⁹ bytes a second.
    pub algbw: f64,
    /// That times the operation's bus factor.
    pub busbw: f64,
    /// The roofline's time as a share of the operation's.
    pub roofline_percent: Option<f64>,
    /// Time of each iteration.
    pub samples_us: Vec<f64>,
}

impl Times {
    /// Of samples in nanoseconds, at least one, of an operation of `size` bytes.
    pub fn new(samples: &[u64], size: usize, bus_factor: f64, roofline: Option<&Roofline>) -> Times {
        let time = Summary::of(samples);
        let algbw = if time.p50_us > 0.0 { size as f64 / time.p50_us / 1e3 } else { 0.0 };
        Times {
            time,
            algbw,
            busbw: algbw * bus_factor,
            roofline_percent: roofline.map(|roofline| 100.0 * roofline.p50_us / time.p50_us),
            samples_us: samples.iter().map(|&sample| sample as f64 / 1e3).collect(),
        }
    }
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
    compares: bool,
    silent: bool,
}

impl Report {
    /// Opens the file, if there is to be one, so that a wrong path fails before the measurement. `compares` if lines have columns of another
    /// library; `silent` on ranks other than 0.
    ///
    /// # Errors
    /// [`Error::Output`].
    pub fn new(json: Option<PathBuf>, compares: bool, silent: bool) -> Result<Report, Error> {
        let file = match json.filter(|_| !silent) {
            Some(path) => {
                // An earlier file stays as it is until there is something to replace it.
                let open = File::options().write(true).create(true).truncate(false).open(&path);
                let file = open.map_err(Error::file(&path))?;
                Some((path, file))
            }
            None => None,
        };
        Ok(Report { file, results: Vec::new(), compares, silent })
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
        let own = |four: [&str; 4], library: [&str; 3]| {
            let overlap = if overlap { four.map(|name| format!("{name:>9}")).concat() } else { String::new() };
            let library =
                if self.compares { library.map(|name| format!("{name:>11}")).concat() } else { String::new() };
            overlap + &library
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
                own(["overall", "compute", "pure", "%hidden"], ["MPI", "MPI/ours", "#MPI wrong"])
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
                own(["(us)", "(us)", "(us)", ""], ["(us)", "", ""])
            ),
        ])
    }

    /// Prints a line: the forms of one operation at one size, and the fastest of what `library` did meanwhile; and keeps all for the file.
    ///
    /// # Errors
    /// [`Error::Output`].
    pub fn line(&mut self, forms: Vec<Measurement>, library: Vec<Measurement>) -> Result<(), Error> {
        let Some(first) = forms.first() else { return Ok(()) };
        let mut line = format!(
            " {:>11} {:>11} {:>6} {:>7} {:>6}  ",
            first.size, first.count, first.dtype, first.redop, first.root
        );
        for form in &forms {
            let not_known = || "N/A".to_string();
            line += &format!(
                "{:>10} {:>7.2} {:>7.2} {:>7} {:>10} {:>10} {:>10} {:>6} ",
                micros(form.times.time.p50_us),
                form.times.algbw,
                form.times.busbw,
                form.wrong.map_or_else(not_known, |wrong| wrong.to_string()),
                micros(form.times.time.p95_us),
                micros(form.times.time.p99_us),
                micros(form.times.time.min_us),
                form.times.roofline_percent.map_or_else(not_known, |percent| format!("{percent:.0}")),
            );
        }
        if let Some(overlap) = &first.overlap {
            for time in [overlap.overall_us, overlap.compute_us, overlap.pure_us] {
                line += &format!("{:>9}", micros(time));
            }
            line += &format!("{:>9.0}", overlap.hidden_percent);
        }
        if self.compares {
            let fastest = library.iter().min_by(|one, other| one.times.time.p50_us.total_cmp(&other.times.time.p50_us));
            let cells = match fastest {
                Some(fastest) => [
                    micros(fastest.times.time.p50_us),
                    format!("{:.2}", fastest.times.time.p50_us / first.times.time.p50_us),
                    fastest.wrong.map_or("N/A".into(), |wrong| wrong.to_string()),
                ],
                None => ["n/a".into(), "n/a".into(), "n/a".into()],
            };
            line += &cells.map(|cell| format!("{cell:>11}")).concat();
        }
        self.results.extend(forms);
        self.results.extend(library);
        self.print([line.trim_end().to_string()])
    }

    /// Prints the sums that nccl-tests prints last, and writes the file.
    ///
    /// # Errors
    /// [`Error::Output`].
    pub fn finish(&mut self, machine: &Machine, command: &[String]) -> Result<(), Error> {
        let moved: Vec<f64> = self
            .results
            .iter()
            .filter(|form| form.call.is_none())
            .map(|form| form.times.busbw)
            .filter(|&busbw| busbw > 0.0)
            .collect();
        let wrong: Option<u64> = self.results.iter().filter_map(|form| form.wrong).reduce(|a, b| a + b);
        let mean = match moved.len() {
            0 => "N/A (nothing was moved)".to_owned(),
            lines => format!("{:.4}", moved.iter().sum::<f64>() / lines as f64),
        };
        let verdict = match wrong {
            Some(0) => "0 OK".into(),
            Some(wrong) => format!("{wrong} FAILED"),
            None => "N/A (not looked for without --check)".into(),
        };
        self.print([
            String::new(),
            format!("# Out of bounds values : {verdict}"),
            format!("# Avg bus bandwidth    : {mean}"),
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
