//! A parquet file of documents.

use std::fs::{self, File};
use std::path::Path;
use std::slice::Chunks;
use std::sync::Arc;

use parquet::basic::{Compression, GzipLevel, ZstdLevel};
use parquet::data_type::{ByteArray, ByteArrayType, Int32Type};
use parquet::file::properties::{WriterProperties, WriterVersion};
use parquet::file::writer::{SerializedFileWriter, SerializedRowGroupWriter};
use parquet::schema::parser::parse_message_type;

use super::documents::check_walk;
use super::{folder, write};

/// Files of texts in several encodings and compressions, and one of chats.
pub fn seeds() -> Vec<Vec<u8>> {
    let root = folder();
    let path = root.path().join("a.parquet");
    let texts = ["one and another", "two", "three", "two"];
    let compressions = [
        Compression::UNCOMPRESSED,
        Compression::SNAPPY,
        Compression::GZIP(GzipLevel::default()),
        Compression::ZSTD(ZstdLevel::default()),
        Compression::LZ4_RAW,
    ];
    let mut seeds = Vec::new();
    let mut made = |properties: WriterProperties, make: fn(&Path, WriterProperties, &[&str], usize)| {
        make(&path, properties, &texts, 2);
        seeds.push(fs::read(&path).expect("it has been written"));
    };
    for (compression, dictionary) in compressions.into_iter().zip([true, false].into_iter().cycle()) {
        let properties = WriterProperties::builder().set_compression(compression).set_dictionary_enabled(dictionary);
        made(properties.build(), write_texts);
    }
    for dictionary in [true, false] {
        let properties = WriterProperties::builder().set_writer_version(WriterVersion::PARQUET_2_0);
        made(properties.set_dictionary_enabled(dictionary).build(), write_texts);
    }
    made(WriterProperties::builder().build(), write_chats);
    seeds
}

/// A file with a column `text` in groups of some rows, and one of numbers.
pub(crate) fn write_texts(path: &Path, properties: WriterProperties, texts: &[&str], rows: usize) {
    let schema = "optional binary text (UTF8); required int32 number;";
    write_groups(path, properties, schema, texts.chunks(rows), |group, rows| {
        texts_of(group, rows, &vec![1; rows.len()], None);
        let mut column = group.next_column().expect("a writer").expect("the second column");
        column.typed::<Int32Type>().write_batch(&vec![7; rows.len()], None, None).expect("a file of our own");
        column.close().expect("a file of our own");
    });
}

/// A file of chats of one message, each with a text as its role and its content.
fn write_chats(path: &Path, properties: WriterProperties, texts: &[&str], rows: usize) {
    let schema = "optional group messages (LIST) { repeated group list { optional group element {
        optional binary role (UTF8); optional binary content (UTF8); } } }";
    write_groups(path, properties, schema, texts.chunks(rows), |group, rows| {
        for _ in ["role", "content"] {
            texts_of(group, rows, &vec![4; rows.len()], Some(&vec![0; rows.len()]));
        }
    });
}

type Group<'a> = SerializedRowGroupWriter<'a, File>;

fn write_groups(
    path: &Path,
    properties: WriterProperties,
    columns: &str,
    groups: Chunks<'_, &str>,
    write: impl Fn(&mut Group<'_>, &[&str]),
) {
    let schema = parse_message_type(&format!("message m {{ {columns} }}")).expect("a schema");
    let file = File::create(path).expect("a file in a folder of our own");
    let mut writer = SerializedFileWriter::new(file, Arc::new(schema), Arc::new(properties)).expect("a file");
    for rows in groups {
        let mut group = writer.next_row_group().expect("a file of our own");
        write(&mut group, rows);
        group.close().expect("all columns are written");
    }
    writer.close().expect("all groups are written");
}

/// Writes a column of texts, with definition and repetition levels.
fn texts_of(group: &mut Group<'_>, rows: &[&str], definitions: &[i16], repetitions: Option<&[i16]>) {
    let mut column = group.next_column().expect("a writer").expect("a column that is left");
    let values: Vec<ByteArray> = rows.iter().map(|&text| text.into()).collect();
    column.typed::<ByteArrayType>().write_batch(&values, Some(definitions), repetitions).expect("a file of our own");
    column.close().expect("a file of our own");
}

/// A problem is a line of text, and a walk goes on from any row.
pub fn check(data: &[u8]) {
    let root = folder();
    check_walk(write(root.path(), "a.parquet", data), false);
}
