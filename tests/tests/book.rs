//! The documents hang together: links lead somewhere, the book's summary lists every chapter, and a
//! script in the book is one that a test runs.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Component, Path, PathBuf};

use pillion_tests::documents::{below, root};
use pulldown_cmark::{Event, Options, Parser, Tag, TagEnd};

/// Where the chapters lie.
const BOOK: &str = "docs/src";
const SUMMARY: &str = "docs/src/SUMMARY.md";
/// Documents outside the book.
const OTHERS: [&str; 4] = ["README.md", "ARCHITECTURE.md", "CHANGELOG.md", "benches/RESULTS.md"];

/// A link to a file of the repository.
struct Link {
    document: PathBuf,
    /// As the document has it.
    written: String,
    /// The file or folder, from the root of the repository.
    target: PathBuf,
    /// The heading in it.
    heading: Option<String>,
}

fn read(document: &Path) -> String {
    fs::read_to_string(root().join(document)).unwrap_or_else(|error| panic!("{}: {error}", document.display()))
}

fn events(text: &str) -> Parser<'_> {
    Parser::new_ext(text, Options::ENABLE_TABLES)
}

/// The links and images of a document that lead to files, or to its own headings.
fn links(document: &Path) -> Vec<Link> {
    let link = |event: Event<'_>| match event {
        Event::Start(Tag::Link { dest_url, .. } | Tag::Image { dest_url, .. }) if !dest_url.contains("://") => {
            let (path, heading) = dest_url.split_once('#').map_or((&*dest_url, None), |(path, id)| (path, Some(id)));
            let target = match path {
                "" => document.to_owned(),
                path => flat(&document.parent().expect("a file").join(path)),
            };
            let heading = heading.map(str::to_owned);
            Some(Link { document: document.to_owned(), written: dest_url.to_string(), target, heading })
        }
        _ => None,
    };
    events(&read(document)).filter_map(link).collect()
}

/// A path without `..`, for which no file need exist.
fn flat(path: &Path) -> PathBuf {
    path.components().fold(PathBuf::new(), |mut flat, part| {
        match part {
            Component::ParentDir => assert!(flat.pop(), "{} leaves the repository", path.display()),
            part => flat.push(part),
        }
        flat
    })
}

/// The names under which links find the headings of a text.
fn headings(text: &str) -> BTreeSet<String> {
    let (mut found, mut heading) = (BTreeSet::new(), None::<String>);
    for event in events(text) {
        match event {
            Event::Start(Tag::Heading { .. }) => heading = Some(String::new()),
            Event::End(TagEnd::Heading(_)) => found.extend(heading.take()),
            Event::Text(part) | Event::Code(part) => {
                let name = part.to_lowercase().replace(' ', "-");
                let kept = name.chars().filter(|c| c.is_alphanumeric() || matches!(c, '-' | '_'));
                heading.iter_mut().for_each(|heading| heading.extend(kept.clone()));
            }
            _ => {}
        }
    }
    found
}

/// The blocks of code that are scripts.
fn scripts(text: &str) -> Vec<String> {
    let (mut found, mut block) = (Vec::new(), None::<String>);
    for event in events(text) {
        match event {
            Event::Start(Tag::CodeBlock(_)) => block = Some(String::new()),
            Event::End(TagEnd::CodeBlock) => found.extend(block.take().filter(|block| block.starts_with("#!"))),
            Event::Text(part) => block.iter_mut().for_each(|block| block.push_str(&part)),
            _ => {}
        }
    }
    found
}

#[test]
fn links_lead_to_files_and_headings() {
    let documents = OTHERS.map(PathBuf::from).into_iter().chain(below(BOOK));
    let links: Vec<Link> = documents.flat_map(|document| links(&document)).collect();
    assert!(links.len() > 60, "{} links", links.len());
    for Link { document, written, target, heading } in &links {
        let place = document.display();
        assert!(root().join(target).exists(), "{place} links to {written}, which does not exist");
        if let Some(heading) = heading {
            let there = headings(&read(target));
            assert!(there.contains(heading), "{place} links to {written}, but the headings there are {there:?}");
        }
    }
}

/// mdBook copies nothing from outside, so a chapter names such a file instead of linking to it.
#[test]
fn links_of_the_book_stay_in_it() {
    for Link { document, written, target, .. } in below(BOOK).iter().flat_map(|document| links(document)) {
        assert!(target.starts_with(BOOK), "{} links to {written}, which is not in the book", document.display());
    }
}

#[test]
fn the_summary_lists_every_chapter_once() {
    let mut listed: Vec<PathBuf> = links(Path::new(SUMMARY)).into_iter().map(|link| link.target).collect();
    listed.sort();
    let chapters: Vec<PathBuf> = below(BOOK).into_iter().filter(|path| path != Path::new(SUMMARY)).collect();
    assert!(chapters.len() > 10, "{chapters:?}");
    assert_eq!(listed, chapters);
}

#[test]
fn scripts_in_the_book_are_those_that_are_tested() {
    let shown: BTreeSet<String> = below(BOOK).iter().flat_map(|document| scripts(&read(document))).collect();
    let examples = fs::read_dir(root().join("docs/examples")).expect("a folder of scripts").flatten();
    let scripts = examples.filter(|file| file.path().extension().is_some_and(|extension| extension == "sh"));
    let files: BTreeSet<String> = scripts.map(|file| fs::read_to_string(file.path()).expect("a script")).collect();
    assert!(!files.is_empty());
    assert_eq!(shown, files);
}
