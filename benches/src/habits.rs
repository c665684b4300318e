//! Flags that users of nccl-tests and of OSU's benchmarks type: accepted where they mean one thing,
//! answered with ours where they do not.

use clap::Args;

use crate::Error;

/// Flags of other benchmarks, which the help does not list.
#[derive(Clone, Debug, Default, Args)]
pub(crate) struct Habits {
    /// nccl-tests: how often to check.
    #[arg(short = 'c', hide = true, value_name = "CHECKS")]
    checks: Option<u32>,
    /// OSU: smallest and largest size. nccl-tests: calls that are measured as one.
    #[arg(short = 'm', long = "message-size", hide = true, value_name = "MIN:MAX", value_parser = sizes)]
    range: Option<Range>,
    /// OSU: iterations. nccl-tests: from one size to the next.
    #[arg(short = 'i', hide = true, value_name = "ITERS")]
    iterations: Option<String>,
    /// nccl-tests: what it measures in other ways.
    #[arg(short = 'a', hide = true)]
    average: Option<String>,
    #[arg(short = 'p', hide = true)]
    parallel_init: Option<String>,
    #[arg(short = 'z', hide = true)]
    blocking: Option<String>,
    #[arg(short = 'G', hide = true)]
    graph: Option<String>,
    #[arg(short = 'C', hide = true)]
    report_cputime: Option<String>,
    #[arg(short = 'N', hide = true)]
    cycles: Option<String>,
    #[arg(short = 'R', hide = true)]
    register: Option<String>,
}

/// Smallest and largest size, as far as given.
type Range = (Option<usize>, Option<usize>);

impl Habits {
    /// Answers flags that mean several things, or nothing here.
    pub(crate) fn answer(&self) -> Result<(), Error> {
        if let Some(number) = &self.iterations {
            return Err(Error::Usage(format!(
                "-i {number} means iterations to OSU's benchmarks and a step in bytes to nccl-tests: iterations are -n {number} here, \
                 sizes at equal distances --sizes"
            )));
        }
        let idle = [
            ("-a", &self.average),
            ("-p", &self.parallel_init),
            ("-z", &self.blocking),
            ("-G", &self.graph),
            ("-C", &self.report_cputime),
            ("-N", &self.cycles),
            ("-R", &self.register),
        ];
        match idle.iter().find(|(_, value)| value.is_some()) {
            Some((flag, _)) => Err(Error::Usage(format!("nccl-tests' {flag} has no counterpart here: leave it out"))),
            None => Ok(()),
        }
    }

    /// Whether results are to be checked.
    pub(crate) fn asks_for_checks(&self) -> bool {
        self.checks.is_some_and(|checks| checks > 0)
    }

    /// Smallest and largest size, if given.
    pub(crate) fn sizes(&self) -> Option<Range> {
        self.range
    }
}

/// OSU's `MIN:MAX`, of which one may be missing.
fn sizes(text: &str) -> Result<Range, String> {
    let one = |text: &str| if text.is_empty() { Ok(None) } else { size(text).map(Some) };
    match text.split_once(':') {
        Some((min, max)) => Ok((one(min)?, one(max)?)),
        None => Err(format!(
            "it means a largest size to OSU's benchmarks, which is -e {text} here, and calls measured as one to nccl-tests, \
             which has no counterpart"
        )),
    }
}

/// Bytes: a number, perhaps with a fraction, and K, M, G or T for a power of 1024, perhaps followed
/// by B or iB.
pub(crate) fn size(text: &str) -> Result<usize, String> {
    let wrong = || "expected bytes such as 8, 4K, 1.5M, 1GB or 1GiB".to_owned();
    let end = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let (number, unit) = text.split_at(end);
    let power = match unit.to_ascii_lowercase().as_str() {
        "" | "b" => 0,
        "k" | "kb" | "kib" => 1,
        "m" | "mb" | "mib" => 2,
        "g" | "gb" | "gib" => 3,
        "t" | "tb" | "tib" => 4,
        _ => return Err(wrong()),
    };
    let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
    if whole.is_empty() && fraction.is_empty() {
        return Err(wrong());
    }
    let too_much = || "more than any machine's memory".to_owned();
    // As an integer over a power of ten, so that nothing is rounded.
    let digits = format!("{whole}{fraction}");
    let numerator: u128 =
        digits.parse().map_err(|_| if digits.bytes().all(|b| b.is_ascii_digit()) { too_much() } else { wrong() })?;
    let denominator =
        u32::try_from(fraction.len()).ok().and_then(|places| 10u128.checked_pow(places)).ok_or_else(wrong)?;
    let scaled =
        numerator.checked_shl(10 * power).filter(|scaled| scaled >> (10 * power) == numerator).ok_or_else(too_much)?;
    if scaled % denominator != 0 {
        return Err(format!("{text} is no whole number of bytes"));
    }
    usize::try_from(scaled / denominator).ok().filter(|&bytes| bytes < 1 << 48).ok_or_else(too_much)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_may_have_units_and_fractions() {
        for (text, bytes) in [
            ("0", 0),
            ("8", 8),
            ("8B", 8),
            ("1k", 1024),
            ("4KB", 4096),
            ("1MiB", 1 << 20),
            ("1.5M", 3 << 19),
            (".5G", 1 << 29),
            ("2.GB", 2 << 30),
            ("1T", 1 << 40),
        ] {
            assert_eq!(size(text), Ok(bytes), "{text}");
        }
        for (text, words) in [
            ("", "expected bytes"),
            (".", "expected bytes"),
            ("K", "expected bytes"),
            ("1.2.3", "expected bytes"),
            ("-1", "expected bytes"),
            ("1 K", "expected bytes"),
            ("1X", "expected bytes"),
            ("0.3K", "no whole number"),
            ("1.5", "no whole number"),
            ("99999999999G", "more than any machine"),
            ("999999999999999999999999999999999999999999", "more than any machine"),
            ("340282366920938463463374607431768211455T", "more than any machine"),
        ] {
            let error = size(text).unwrap_err();
            assert!(error.contains(words), "{text}: {error}");
        }
    }
}
