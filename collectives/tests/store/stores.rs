//! What every store must do.

use std::collections::BTreeSet;
use std::fs;
use std::io::{BufRead, BufReader};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use pillion_collectives::{Error, FolderStore, Store};

use super::{PATIENCE, kinds, process, ranks};

#[test]
fn values_of_any_length_under_keys_of_any_text() {
    let long = "/.ä/".repeat(204);
    let keys =
        ["", "a", "a/b", "a%2fb", "a.b", "..", "../../x", "/", "ä 日本\n\0", "A", "a-", "x/y/../z", &long, &long[1..]];
    for (kind, stores, _folder) in kinds() {
        let [zero, one] = [0, 1].map(&stores);
        for (number, key) in keys.iter().enumerate() {
            assert_eq!(one.get(key).unwrap(), None, "{kind}: {key:?}");
            let value = |len: usize| (0..len).map(|at| (at * 7 + number) as u8).collect::<Vec<u8>>();
            one.set(key, &value(1 << 20)).unwrap();
            assert!(zero.get(key).unwrap() == Some(value(1 << 20)), "{kind}: {key:?}");
            zero.set(key, &value(number % 2)).unwrap();
        }
        for (number, key) in keys.iter().enumerate() {
            // The count of the same key is apart.
            assert_eq!(one.add(key, 5).unwrap(), 5, "{kind}: {key:?}");
            assert_eq!(zero.add(key, -7).unwrap(), -2, "{kind}: {key:?}");
            assert_eq!(one.get(key).unwrap().map(|value| value.len()), Some(number % 2), "{kind}: {key:?}");
        }
    }
}

#[test]
fn nothing_is_written_outside_the_folder() {
    let outer = tempfile::tempdir().unwrap();
    let store = FolderStore::new(outer.path().join("inner")).unwrap();
    for key in ["../x", "/tmp/x", "..", "."] {
        store.set(key, b"value").unwrap();
        store.add(key, 1).unwrap();
    }
    assert_eq!(fs::read_dir(outer.path()).unwrap().count(), 1);
    assert_eq!(fs::read_dir(outer.path().join("inner")).unwrap().count(), 8);
}

#[test]
fn a_rank_waits_for_a_value_and_names_the_key_that_nobody_sets() {
    for (kind, stores, _folder) in kinds() {
        let [zero, one] = [0, 1].map(&stores);
        thread::scope(|scope| {
            let waiting = scope.spawn(|| one.wait("late", PATIENCE).unwrap());
            zero.set("late", b"come").unwrap();
            assert_eq!(waiting.join().unwrap(), b"come", "{kind}");
        });
        let error = one.wait("never", Duration::from_millis(50)).unwrap_err();
        assert!(matches!(error, Error::Store { .. }) && error.to_string().contains("\"never\" within"), "{error}");
        assert_eq!(zero.wait("late", Duration::MAX).unwrap(), b"come");
    }
}

#[test]
fn no_reader_sees_a_part_of_a_value() {
    for (kind, stores, _folder) in kinds() {
        let [zero, one] = [0, 1].map(&stores);
        thread::scope(|scope| {
            scope.spawn(|| (1..=200u8).for_each(|number| zero.set("key", &vec![number; 70_000]).unwrap()));
            let mut last = 0;
            while last < 200 {
                let Some(value) = one.get("key").unwrap() else { continue };
                assert!(value.len() == 70_000 && value.iter().all(|&byte| byte == value[0]), "{kind}");
                assert!(value[0] >= last, "{kind}");
                last = value[0];
            }
        });
    }
}

#[test]
fn additions_are_exact_among_threads() {
    for (kind, stores, _folder) in kinds() {
        let stores: Vec<Arc<dyn Store>> = (0..8).map(&stores).collect();
        let sums = ranks(8, |rank| (0..50).map(|_| stores[rank].add("count", 1).unwrap()).collect::<Vec<i64>>());
        assert!(sums.iter().all(|own| own.is_sorted()), "{kind}");
        let all: BTreeSet<i64> = sums.into_iter().flatten().collect();
        assert!(all.into_iter().eq(1..=400), "{kind}: two callers got the same sum");
        if kind == "a foreign store" {
            continue;
        }
        assert_eq!(stores[1].add("count", i64::MAX - 400).unwrap(), i64::MAX);
        let error = stores[1].add("count", 1).unwrap_err().to_string();
        assert!(error.contains("overflow"), "{kind}: {error}");
        assert_eq!(stores[0].add("count", 0).unwrap(), i64::MAX, "{kind}");
    }
}

#[test]
fn additions_in_a_folder_are_exact_among_processes() {
    let folder = tempfile::tempdir().unwrap();
    let place = folder.path().display().to_string();
    let processes: Vec<_> = (0..8).map(|rank| process("add 100", rank, &place)).collect();
    let said: Vec<String> = processes
        .into_iter()
        .map(|process| String::from_utf8(process.wait_with_output().unwrap().stdout).unwrap())
        .collect();
    let sums: BTreeSet<i64> = said.iter().flat_map(|said| said.lines()).filter_map(sum).collect();
    assert!(sums.into_iter().eq(1..=800), "{said:?}");
}

fn sum(line: &str) -> Option<i64> {
    line.strip_prefix("sum ")?.parse().ok()
}

#[test]
fn a_process_that_is_killed_while_it_adds_blocks_nobody() {
    let folder = tempfile::tempdir().unwrap();
    let place = folder.path().display().to_string();
    let store = FolderStore::new(folder.path()).unwrap();
    let (mut seen, started) = (BTreeSet::new(), Instant::now());
    for round in 0..6 {
        let mut processes = [0, 1].map(|rank| process("add", rank, &place));
        let mut out = processes.each_mut().map(|process| BufReader::new(process.stdout.take().unwrap()).lines());
        for lines in &mut out {
            // They are at work, wherever the kill finds them.
            let first = lines.find_map(|line| sum(&line.unwrap())).unwrap();
            assert!(seen.insert(first));
        }
        thread::sleep(Duration::from_millis(3 * round));
        for (process, lines) in processes.iter_mut().zip(out) {
            process.kill().unwrap();
            process.wait().unwrap();
            // What they have said is read to the end. The last line may be cut off.
            let mut sums: Vec<i64> = lines.filter_map(|line| sum(&line.ok()?)).collect();
            sums.pop();
            sums.into_iter().for_each(|sum| assert!(seen.insert(sum), "{sum} was given twice"));
        }
        assert!(seen.insert(store.add("count", 1).unwrap()));
    }
    let mut holder = process("lock", 0, &place);
    let mut lines = BufReader::new(holder.stdout.take().unwrap()).lines();
    assert!(lines.any(|line| line.unwrap() == "locked"));
    thread::scope(|scope| {
        let waiting = scope.spawn(|| store.add("count", 1).unwrap());
        thread::sleep(Duration::from_millis(100));
        assert!(!waiting.is_finished(), "another process is adding");
        holder.kill().unwrap();
        holder.wait().unwrap();
        assert!(seen.insert(waiting.join().unwrap()));
    });
    assert!(started.elapsed() < PATIENCE, "a killed process kept its lock");
}

#[test]
fn what_stands_in_the_way_in_a_folder_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let store = FolderStore::new(folder.path()).unwrap();
    let path = |name: &str| folder.path().join(name);
    fs::create_dir(path("v-key")).unwrap();
    fs::write(path("c-key"), "abc").unwrap();
    for (error, expected) in [
        (store.set(&"x".repeat(1025), b"x").unwrap_err(), "1025 bytes, and at most 1024 fit"),
        (store.set("key", b"x").unwrap_err(), "v-key"),
        (store.get("key").unwrap_err(), "v-key"),
        (store.add("key", 1).unwrap_err(), "c-key has 3 bytes, and a count has 8"),
    ] {
        assert!(error.to_string().contains(expected), "{error}");
    }
    // A write that failed leaves nothing.
    assert!(
        fs::read_dir(folder.path()).unwrap().all(|entry| !entry.unwrap().path().to_string_lossy().ends_with(".part"))
    );
    let error = FolderStore::new(path("c-key")).unwrap_err().to_string();
    assert!(error.contains("cannot make the folder") && error.contains("c-key"), "{error}");
    fs::remove_dir_all(folder.path()).unwrap();
    let error = store.get("other").unwrap_err().to_string();
    assert!(error.contains("cannot open the folder"), "{error}");
}
