//! Lines of files that may be compressed.

use std::fs::File;
use std::io::{self, BufRead, BufReader, Read, Seek, SeekFrom};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use super::{Compression, Fault, Input, LONGEST, Position};
use crate::error::Error;

/// The lines of a file, from one of them on.
pub(super) struct Lines {
    reader: Box<dyn BufRead + Send>,
    input: Input,
    byte: u64,
    /// Blank lines are no records.
    json: bool,
}

impl Lines {
    pub(super) fn open(
        input: &Input,
        compression: Compression,
        from: Position,
        json: bool,
        read: &Arc<AtomicU64>,
    ) -> Result<Self, Fault> {
        let mut lines = match compression {
            Compression::No => {
                let mut file = counted(input, read)?;
                file.file.seek(SeekFrom::Start(from.byte)).map_err(|error| fault(input, error))?;
                file.read.fetch_add(from.byte, Ordering::Relaxed);
                Self { reader: Box::new(BufReader::with_capacity(BUFFER, file)), input: input.clone(), byte: 0, json }
            }
            _ => {
                let mut reader = decompress(input, compression, read)?;
                let skipped = io::copy(&mut reader.by_ref().take(from.byte), &mut io::sink());
                skipped.map_err(|error| fault(input, error))?;
                Self { reader, input: input.clone(), byte: 0, json }
            }
        };
        lines.byte = from.byte;
        Ok(lines)
    }

    /// Bytes before the next line.
    pub(super) fn byte(&self) -> u64 {
        self.byte
    }

    /// The next line, without its end.
    pub(super) fn next(&mut self) -> Result<Option<Vec<u8>>, Fault> {
        let mut line = Vec::new();
        let read = self.reader.by_ref().take(LONGEST + 1).read_until(b'\n', &mut line);
        let read = read.map_err(|error| fault(&self.input, error))?;
        if read as u64 > LONGEST {
            return Err(Fault::Damaged(format!("a line of more than {LONGEST} bytes; cut it")));
        }
        if read == 0 {
            return Ok(None);
        }
        let is_first = self.byte == 0;
        self.byte += read as u64;
        if line.ends_with(b"\n") {
            line.pop();
            if line.ends_with(b"\r") {
                line.pop();
            }
        }
        if self.json && is_first && line.starts_with(BYTE_ORDER_MARK) {
            line.drain(..BYTE_ORDER_MARK.len());
        }
        Ok(Some(line))
    }
}

const BUFFER: usize = 1 << 18;
const BYTE_ORDER_MARK: &[u8] = "\u{feff}".as_bytes();

/// The bytes of a file, uncompressed.
pub(super) fn decompress(
    input: &Input,
    compression: Compression,
    read: &Arc<AtomicU64>,
) -> Result<Box<dyn BufRead + Send>, Fault> {
    let file = BufReader::with_capacity(BUFFER, counted(input, read)?);
    Ok(match compression {
        Compression::No => Box::new(file),
        Compression::Gzip => Box::new(BufReader::with_capacity(BUFFER, flate2::bufread::MultiGzDecoder::new(file))),
        Compression::Zstd => {
            let decoder = zstd::Decoder::with_buffer(file).map_err(|error| fault(input, error))?;
            Box::new(BufReader::with_capacity(BUFFER, decoder))
        }
    })
}

/// A problem of reading: the system's, or of what was compressed.
pub(super) fn fault(input: &Input, error: io::Error) -> Fault {
    if error.raw_os_error().is_some() {
        return Fault::Fatal(Error::Read { path: input.path.clone(), source: error });
    }
    Fault::Damaged(format!("damaged or cut short, so it cannot be decompressed from here on: {error}; fetch it again"))
}

struct Counted {
    file: File,
    read: Arc<AtomicU64>,
}

fn counted(input: &Input, read: &Arc<AtomicU64>) -> Result<Counted, Fault> {
    let file = File::open(&input.path).map_err(Error::reading(&input.path))?;
    Ok(Counted { file, read: read.clone() })
}

impl Read for Counted {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        let count = self.file.read(into)?;
        self.read.fetch_add(count as u64, Ordering::Relaxed);
        Ok(count)
    }
}
