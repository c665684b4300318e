//! Rows of parquet files.

use std::fs::File;
use std::sync::Arc;

use parquet::errors::ParquetError;
use parquet::file::reader::{FileReader, SerializedFileReader};
use parquet::record::reader::{ReaderIter, TreeBuilder};
use parquet::record::{Field, Row};
use parquet::schema::types::{SchemaDescriptor, Type};
use serde_json::Value;

use super::pages::Checked;
use super::{Fault, Input};
use crate::error::Error;
use crate::guard::{guarded, plain};

/// Columns that may make a document, if the user names none.
const COLUMNS: [&str; 4] = ["text", "messages", "prompt", "completion"];

/// The rows of a file, from one of them on; only the columns that make a document.
pub(super) struct Rows {
    reader: SerializedFileReader<File>,
    columns: Arc<SchemaDescriptor>,
    group: usize,
    /// Rows of all groups before this one.
    before: u64,
    rows: Option<ReaderIter>,
    done: u64,
    total: u64,
}

impl Rows {
    pub(super) fn open(input: &Input, field: Option<&str>, from: u64) -> Result<Self, Fault> {
        reading(|| Self::open_at(input, field, from))
    }

    fn open_at(input: &Input, field: Option<&str>, from: u64) -> Result<Self, Fault> {
        let file = File::open(&input.path).map_err(Error::reading(&input.path))?;
        let reader = SerializedFileReader::new(file).map_err(|error| damaged(&error))?;
        let metadata = reader.metadata().file_metadata();
        let schema = metadata.schema();
        let wanted: Vec<&str> = field.map_or(COLUMNS.to_vec(), |field| vec![field]);
        let kept: Vec<_> =
            schema.get_fields().iter().filter(|column| wanted.contains(&column.name())).cloned().collect();
        if kept.is_empty() {
            let names: Vec<&str> = schema.get_fields().iter().map(|column| column.name()).collect();
            let names = plain(&names.join(", "));
            let wanted = wanted.join(" or ");
            return Err(Fault::Damaged(format!("it has no column {wanted}; name one of {names} with --field")));
        }
        let projected = Type::group_type_builder(schema.name()).with_fields(kept).build();
        let projected = projected.map_err(|error| damaged(&error))?;
        check(&reader, input.bytes)?;
        let rows = reader.metadata().row_groups().iter().map(|group| group.num_rows() as u64);
        let total = rows.fold(0, u64::saturating_add);
        let columns = Arc::new(SchemaDescriptor::new(Arc::new(projected)));
        let mut rows = Self { reader, columns, group: 0, before: 0, rows: None, done: 0, total };
        rows.skip(from)?;
        Ok(rows)
    }

    fn skip(&mut self, count: u64) -> Result<(), Fault> {
        while self.done < count && self.group < self.reader.num_row_groups() {
            let rows = self.rows_of_group();
            if rows > count - self.done {
                break;
            }
            self.done += rows;
            self.group += 1;
        }
        self.before = self.done;
        while self.done < count {
            if self.row()?.is_none() {
                break;
            }
        }
        Ok(())
    }

    fn rows_of_group(&self) -> u64 {
        self.reader.metadata().row_group(self.group).num_rows() as u64
    }

    /// The part of a number of bytes that corresponds to the rows that have been read.
    pub(super) fn share_of(&self, bytes: u64) -> u64 {
        (u128::from(bytes) * u128::from(self.done) / u128::from(self.total.max(1))) as u64
    }

    /// The next row, as a JSON object.
    pub(super) fn next(&mut self) -> Result<Option<Value>, Fault> {
        reading(|| self.row())
    }

    fn row(&mut self) -> Result<Option<Value>, Fault> {
        loop {
            if let Some(rows) = &mut self.rows {
                if let Some(row) = rows.next() {
                    self.done += 1;
                    return Ok(Some(object(&row.map_err(|error| damaged(&error))?)));
                }
                let (expected, found) = (self.rows_of_group(), self.done - self.before);
                if found != expected {
                    return Err(unreadable(&format!("damaged: {found} rows of {expected} in a group")));
                }
                self.before = self.done;
                self.rows = None;
                self.group += 1;
            }
            if self.group >= self.reader.num_row_groups() {
                return Ok(None);
            }
            let group = self.reader.get_row_group(self.group).map_err(|error| damaged(&error))?;
            let rows = TreeBuilder::new().with_batch_size(ROWS).as_iter(self.columns.clone(), &Checked(&*group));
            self.rows = Some(rows.map_err(|error| damaged(&error))?);
        }
    }
}

/// The crate panics for columns that lie outside the file, and takes a negative number of rows for a
/// large one.
fn check(reader: &SerializedFileReader<File>, bytes: u64) -> Result<(), Fault> {
    let groups = reader.metadata().row_groups();
    if let Some(group) = groups.iter().find(|group| group.num_rows() < 0) {
        return Err(unreadable(&format!("damaged: a group of {} rows", group.num_rows())));
    }
    for column in groups.iter().flat_map(|group| group.columns()) {
        let first = column.dictionary_page_offset().unwrap_or(column.data_page_offset());
        let end = u64::try_from(first).ok().zip(u64::try_from(column.compressed_size()).ok());
        let end = end.and_then(|(first, length)| first.checked_add(length));
        if column.data_page_offset() < 0 || end.is_none_or(|end| end > bytes) {
            return Err(Fault::Damaged(format!(
                "damaged: column {} lies outside the file; fetch it again",
                plain(&column.column_path().string())
            )));
        }
    }
    Ok(())
}

/// Rows that are decoded together. They are in memory together, too.
const ROWS: usize = 64;

fn damaged(error: &ParquetError) -> Fault {
    unreadable(&error.to_string())
}

fn unreadable(problem: &str) -> Fault {
    let problem = plain(problem);
    Fault::Damaged(format!("no parquet file that can be read: {problem}; fetch it again, or convert it to JSON lines"))
}

/// The crate panics on some files that are damaged, or have columns of types that it does not know.
pub(super) fn reading<T>(call: impl FnOnce() -> Result<T, Fault>) -> Result<T, Fault> {
    guarded(call).unwrap_or_else(|problem| Err(unreadable(&problem)))
}

fn object(row: &Row) -> Value {
    Value::Object(row.get_column_iter().map(|(name, field)| (name.clone(), value(field))).collect())
}

/// As JSON. Columns of text whose writer has not marked them as UTF-8 are texts, too.
fn value(field: &Field) -> Value {
    match field {
        Field::Bytes(bytes) => match std::str::from_utf8(bytes.data()) {
            Ok(text) => Value::String(text.to_owned()),
            Err(_) => Value::Bool(false),
        },
        Field::Group(row) => object(row),
        Field::ListInternal(list) => Value::Array(list.elements().iter().map(value).collect()),
        other => other.to_json_value(),
    }
}
