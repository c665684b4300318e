//! Reads quantities with units, such as `50GB/s`, `400Gbit/s`, `5us`, `400T` and `64MiB`.

/// What a quantity is of, and so which units it may have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Bandwidth,
    Duration,
    Speed,
    Size,
}

/// (unit, what it is in the unit that values have). A longer one stands before its ending.
type Units = [(&'static str, f64)];

impl Kind {
    fn units(self) -> &'static Units {
        match self {
            Kind::Bandwidth => &[("bit/s", 0.125), ("B/s", 1.0)],
            Kind::Duration => &[("s", 1.0)],
            Kind::Speed => &[("FLOP/s", 1.0), ("FLOPS", 1.0), ("", 1.0)],
            Kind::Size => &[("B", 1.0), ("", 1.0)],
        }
    }

    /// The least that is above 0, and the most: with more, times of steps would not be numbers.
    fn range(self) -> std::ops::RangeInclusive<f64> {
        match self {
            Kind::Bandwidth => 1.0..=1e18,
            Kind::Duration => 1e-12..=1e6,
            Kind::Speed => 1.0..=1e24,
            Kind::Size => 1.0..=1e18,
        }
    }

    fn examples(self) -> &'static str {
        match self {
            Kind::Bandwidth => "50GB/s, 12.5GiB/s or 400Gbit/s",
            Kind::Duration => "5us, 0.2ms or 1s",
            Kind::Speed => "400T or 150GFLOP/s",
            Kind::Size => "64MiB or 1GB",
        }
    }
}

const PREFIXES: [(&str, f64); 15] = [
    ("Ki", 1024.0),
    ("Mi", 1_048_576.0),
    ("Gi", 1_073_741_824.0),
    ("Ti", 1_099_511_627_776.0),
    ("n", 1e-9),
    ("u", 1e-6),
    ("µ", 1e-6),
    ("m", 1e-3),
    ("k", 1e3),
    ("K", 1e3),
    ("M", 1e6),
    ("G", 1e9),
    ("T", 1e12),
    ("P", 1e15),
    ("", 1.0),
];

/// Bytes a second.
///
/// # Errors
/// Says how to write it.
pub(crate) fn bandwidth(text: &str) -> Result<f64, String> {
    positive(Kind::Bandwidth, text)
}

/// Floating-point operations a second.
///
/// # Errors
/// Says how to write it.
pub(crate) fn speed(text: &str) -> Result<f64, String> {
    positive(Kind::Speed, text)
}

/// Bytes; a part of a byte does not count.
///
/// # Errors
/// Says how to write it.
pub(crate) fn size(text: &str) -> Result<u64, String> {
    Ok(positive(Kind::Size, text)? as u64)
}

/// Seconds, which may be none.
///
/// # Errors
/// Says how to write it.
pub(crate) fn duration(text: &str) -> Result<f64, String> {
    let value = if text.trim() == "0" { 0.0 } else { quantity(Kind::Duration, text)? };
    if value == 0.0 { Ok(value) } else { in_range(Kind::Duration, value) }
}

fn positive(kind: Kind, text: &str) -> Result<f64, String> {
    in_range(kind, quantity(kind, text)?)
}

fn in_range(kind: Kind, value: f64) -> Result<f64, String> {
    let range = kind.range();
    if range.contains(&value) {
        return Ok(value);
    }
    let (least, most) = (range.start(), range.end());
    let (unit, _) = kind.units().iter().find(|(_, scale)| *scale == 1.0).expect("each kind has a base unit");
    Err(format!("it is out of range, from {least:e} {unit} to {most:e} {unit}, as in {}", kind.examples()))
}

fn quantity(kind: Kind, text: &str) -> Result<f64, String> {
    let refuse = |what: &str| Err(format!("{what}: write it as in {}", kind.examples()));
    let text = text.trim();
    let starts_with_number = text.starts_with(|first: char| first.is_ascii_digit() || first == '.');
    let ends = text.char_indices().map(|(index, _)| index).chain([text.len()]).rev();
    // The longest part that is a number: what follows may begin with a letter that belongs to numbers, as in 5e9.
    let number = ends.filter_map(|end| Some((text[..end].parse::<f64>().ok()?, text[end..].trim_start()))).next();
    let Some((number, rest)) = number.filter(|_| starts_with_number) else {
        return refuse("a number must come first");
    };
    for (unit, scale) in kind.units() {
        let prefix = rest.strip_suffix(unit).and_then(|rest| PREFIXES.iter().find(|(prefix, _)| *prefix == rest));
        if let Some((_, factor)) = prefix {
            let value = number * factor * scale;
            return if value.is_finite() { Ok(value) } else { refuse("it is too large") };
        }
    }
    if rest.is_empty() { refuse("a unit is missing") } else { refuse(&format!("{rest:?} is no unit here")) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantities_have_prefixes_and_units() {
        for (text, expected) in
            [("50GB/s", 50e9), ("400Gbit/s", 50e9), ("1 MiB/s", 1_048_576.0), ("5e9B/s", 5e9), (".5kB/s", 500.0)]
        {
            assert_eq!(bandwidth(text), Ok(expected), "{text}");
        }
        for (text, expected) in [("400T", 400e12), ("1.5GFLOP/s", 1.5e9), ("2PFLOPS", 2e15), ("7", 7.0)] {
            assert_eq!(speed(text), Ok(expected), "{text}");
        }
        for (text, expected) in
            [("64MiB", 64 << 20), ("1.5 GB", 1_500_000_000), ("1.9B", 1), ("4096", 4096), ("2KB", 2000)]
        {
            assert_eq!(size(text), Ok(expected), "{text}");
        }
        for (text, expected) in [("5us", 5e-6), ("5µs", 5e-6), ("0.5 ms", 0.5e-3), ("2s", 2.0), ("0", 0.0), ("0s", 0.0)]
        {
            let read = duration(text).unwrap();
            assert!((read - expected).abs() <= 1e-15 * expected, "{text}: {read}");
        }
    }

    #[test]
    fn what_is_no_quantity_is_refused_with_an_example() {
        for text in ["", "GB/s", "50", "50GB", "50 Gb/s", "0GB/s", "-1GB/s", "infGB/s", "1e300PB/s", "5us"] {
            assert!(bandwidth(text).unwrap_err().contains("50GB/s"), "{text}");
        }
        for text in ["5", "5m", "us", "nan", "-1us", "5 minutes"] {
            assert!(duration(text).unwrap_err().contains("5us"), "{text}");
        }
        for text in ["", "MiB", "0", "-1MiB", "2EB", "1e300PB", "64Mibit", "64MB/s"] {
            assert!(size(text).unwrap_err().contains("64MiB"), "{text}");
        }
        for text in ["0", "T", "400TB/s"] {
            assert!(speed(text).unwrap_err().contains("400T"), "{text}");
        }
    }
}
