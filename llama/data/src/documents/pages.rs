//! Pages of parquet files, checked before the crate `parquet` decodes them.
//!
//! The crate takes memory for as many values as a page says that it has. For a damaged page this
//! may be so much that the process ends. So the numbers of values for which it does so are compared
//! with the bytes that there are. A page itself has at most 2 GiB, by its format.

use parquet::basic::Encoding;
use parquet::bloom_filter::Sbbf;
use parquet::column::page::{Page, PageMetadata, PageReader};
use parquet::errors::{ParquetError, Result};
use parquet::file::metadata::RowGroupMetaData;
use parquet::file::reader::RowGroupReader;
use parquet::record::reader::RowIter;
use parquet::schema::types::Type;

/// Values that a byte of a dictionary holds at most: bits.
const OF_DICTIONARY: usize = 8;
/// Lengths of texts that a byte holds at most, as differences: known writers make blocks of 128,
/// each with a head.
const OF_DIFFERENCES: usize = 128;

/// A row group whose pages are checked.
pub(super) struct Checked<'a>(pub(super) &'a dyn RowGroupReader);

impl RowGroupReader for Checked<'_> {
    fn metadata(&self) -> &RowGroupMetaData {
        self.0.metadata()
    }

    fn num_columns(&self) -> usize {
        self.0.num_columns()
    }

    fn get_column_page_reader(&self, column: usize) -> Result<Box<dyn PageReader>> {
        let levels = self.metadata().column(column).column_descr();
        let levels = usize::from(levels.max_rep_level() > 0) + usize::from(levels.max_def_level() > 0);
        Ok(Box::new(Pages { pages: self.0.get_column_page_reader(column)?, levels }))
    }

    fn get_column_bloom_filter(&self, column: usize) -> Option<&Sbbf> {
        self.0.get_column_bloom_filter(column)
    }

    fn get_row_iter(&self, projection: Option<Type>) -> Result<RowIter<'_>> {
        self.0.get_row_iter(projection)
    }
}

/// The pages of a column.
struct Pages {
    pages: Box<dyn PageReader>,
    /// Parts of a page of version 1 before its values.
    levels: usize,
}

impl PageReader for Pages {
    fn get_next_page(&mut self) -> Result<Option<Page>> {
        let page = self.pages.get_next_page()?;
        if let Some(page) = &page {
            check(page, self.levels)?;
        }
        Ok(page)
    }

    fn peek_next_page(&mut self) -> Result<Option<PageMetadata>> {
        self.pages.peek_next_page()
    }

    fn skip_next_page(&mut self) -> Result<()> {
        self.pages.skip_next_page()
    }

    fn at_record_boundary(&mut self) -> Result<bool> {
        self.pages.at_record_boundary()
    }
}

impl Iterator for Pages {
    type Item = Result<Page>;

    fn next(&mut self) -> Option<Result<Page>> {
        self.get_next_page().transpose()
    }
}

fn check(page: &Page, levels: usize) -> Result<()> {
    let buffer = page.buffer();
    let (encoding, values) = match *page {
        Page::DictionaryPage { num_values, .. } => {
            let fits = num_values as usize <= OF_DICTIONARY * buffer.len();
            return if fits { Ok(()) } else { Err(damaged()) };
        }
        Page::DataPage { encoding, .. } => (encoding, after_levels(buffer, levels)),
        Page::DataPageV2 { encoding, def_levels_byte_len, rep_levels_byte_len, .. } => {
            (encoding, buffer.get(def_levels_byte_len as usize + rep_levels_byte_len as usize..))
        }
    };
    let lists = match encoding {
        Encoding::DELTA_LENGTH_BYTE_ARRAY => 1,
        // Lengths of what a text shares with the one before, then those of its rest.
        Encoding::DELTA_BYTE_ARRAY => 2,
        _ => 0,
    };
    // There are no lists where all values are null.
    let mut rest = values.unwrap_or_default();
    for _ in 0..if rest.is_empty() { 0 } else { lists } {
        rest = after_differences(rest).ok_or_else(damaged)?;
    }
    Ok(())
}

/// The values of a page of version 1: each part before them begins with its length.
fn after_levels(page: &[u8], levels: usize) -> Option<&[u8]> {
    (0..levels).try_fold(page, |rest, _| {
        let (length, rest) = rest.split_first_chunk::<4>()?;
        rest.get(u32::from_le_bytes(*length) as usize..)
    })
}

/// What follows a list of differences (DELTA_BINARY_PACKED), none if it cannot be one.
///
/// After a head of four numbers it has blocks: the least difference, the width of each part, and
/// the parts, of which those after the last value are left out.
fn after_differences(mut rest: &[u8]) -> Option<&[u8]> {
    let most = OF_DIFFERENCES * rest.len();
    let [block, parts, count, _first] = [(); 4].map(|()| number(&mut rest));
    let (parts, count) = (parts?, count?);
    let of_part = block?.checked_div(parts).filter(|&values| values > 0)?;
    if count > most {
        return None;
    }
    let mut left = count.saturating_sub(1);
    while left > 0 {
        number(&mut rest)?;
        for &width in rest.split_off(..parts)? {
            if left > 0 {
                rest.split_off(..of_part.checked_mul(usize::from(width))? / 8)?;
                left = left.saturating_sub(of_part);
            }
        }
    }
    Some(rest)
}

fn number(rest: &mut &[u8]) -> Option<usize> {
    usize::try_from(prost::encoding::decode_varint(rest).ok()?).ok()
}

fn damaged() -> ParquetError {
    ParquetError::General("damaged: a page says that it has more values than its bytes can hold".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn dictionary(bytes: &[u8], num_values: u32) -> Page {
        Page::DictionaryPage { buf: bytes.to_vec().into(), num_values, encoding: Encoding::PLAIN, is_sorted: false }
    }

    fn lengths(bytes: &[u8], encoding: Encoding) -> Page {
        let [def_level_encoding, rep_level_encoding] = [Encoding::RLE; 2];
        let buf = bytes.to_vec().into();
        Page::DataPage { buf, num_values: 1, encoding, def_level_encoding, rep_level_encoding, statistics: None }
    }

    #[test]
    fn pages_that_would_take_more_memory_than_their_bytes_are_refused() {
        check(&dictionary(&[0; 8], 2), 1).unwrap();
        check(&dictionary(&[0; 8], u32::MAX), 1).unwrap_err();
        // Blocks of 128 in 4 parts; then the number of values, and the first.
        let [one, two] = [Encoding::DELTA_LENGTH_BYTE_ARRAY, Encoding::DELTA_BYTE_ARRAY];
        let few = [0x80, 1, 4, 1, 6];
        let many = [0x80, 1, 4, 0xff, 0xff, 0xff, 0xff, 0x7f, 6];
        check(&lengths(&few, one), 0).unwrap();
        check(&lengths(&[few, few].concat(), two), 0).unwrap();
        check(&lengths(&[&[2, 0, 0, 0, 9, 9][..], &few].concat(), one), 1).unwrap();
        for (bytes, encoding) in [(&many[..], one), (&many, two), (&[&few[..], &many].concat(), two), (&few, two)] {
            check(&lengths(bytes, encoding), 0).unwrap_err();
        }
        // A part of no values.
        check(&lengths(&[0, 4, 9, 6, 0, 0, 0, 0, 0], one), 0).unwrap_err();
    }
}
