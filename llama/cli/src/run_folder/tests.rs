use super::*;

fn entries(folder: &Path) -> Vec<String> {
    let mut names: Vec<String> =
        fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().file_name().to_string_lossy().into_owned()).collect();
    names.sort();
    names
}

fn write(folder: &Path, name: &str, text: &str) {
    let path = folder.join(name);
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    fs::write(path, text).unwrap();
}

#[test]
fn only_what_runs_wrote_is_set_aside() {
    let place = tempfile::tempdir().unwrap();
    let folder = RunFolder::claim(place.path()).unwrap();
    assert_eq!(folder.set_aside(None, false).unwrap(), None, "there was no run");
    for name in ["notes", "checkpoints/notes", "checkpoints/epoch-3/model.pth", "trace/notes"] {
        write(place.path(), name, "mine");
    }
    write(place.path(), "checkpoints/step-00000005/manifest.json", "ours");
    write(place.path(), "checkpoints/step-00000009.aside.2/manifest.json", "ours");
    write(place.path(), "metrics.jsonl", "{\"step\":1}\n");
    write(place.path(), "tokens/text.tokens", "tokens");
    let aside = folder.set_aside(None, false).unwrap().unwrap();
    assert_eq!(aside, folder.path().join("earlier-1"));
    assert_eq!(entries(&aside), ["checkpoints", "metrics.jsonl"]);
    assert_eq!(entries(&aside.join("checkpoints")), ["step-00000005", "step-00000009.aside.2"]);
    assert_eq!(entries(place.path()), [".pillion.lock", "checkpoints", "earlier-1", "notes", "tokens", "trace"]);
    assert_eq!(entries(&place.path().join("checkpoints")), ["epoch-3", "notes"]);
    assert_eq!(folder.set_aside(None, false).unwrap(), None, "there is no run any more");
}

#[test]
fn a_foreign_file_with_the_name_of_ours_is_refused_and_kept() {
    for (name, text) in [("metrics.jsonl", "{\"loss\": 1}"), ("trace.json", "[]")] {
        let place = tempfile::tempdir().unwrap();
        write(place.path(), "checkpoints/step-00000005/manifest.json", "ours");
        write(place.path(), name, text);
        let error = RunFolder::claim(place.path()).unwrap().set_aside(None, true).unwrap_err().to_string();
        assert!(error.contains(name) && error.contains("was not written by pillion"), "{error}");
        assert_eq!(fs::read_to_string(place.path().join(name)).unwrap(), text);
        assert!(place.path().join("checkpoints/step-00000005").exists(), "nothing was moved");
    }
}

#[test]
fn a_run_that_is_resumed_stays() {
    let place = tempfile::tempdir().unwrap();
    let saved = place.path().join("checkpoints/step-00000005");
    fs::create_dir_all(&saved).unwrap();
    write(place.path(), "metrics.jsonl", "{\"step\":1}\n");
    let folder = RunFolder::claim(place.path()).unwrap();
    assert_eq!(folder.set_aside(Some(&saved), false).unwrap(), None);
    assert!(folder.set_aside(Some(&place.path().join("checkpoints")), false).unwrap().is_some());
}

#[test]
fn a_lock_that_is_a_link_or_the_users_file_is_refused_and_kept() {
    let place = tempfile::tempdir().unwrap();
    write(place.path(), "precious", "mine");
    fs::create_dir(place.path().join("link")).unwrap();
    symlink(place.path().join("precious"), place.path().join("link").join(LOCK)).unwrap();
    write(place.path(), "file/.pillion.lock", "mine");
    for name in ["link", "file"] {
        let error = RunFolder::claim(&place.path().join(name)).err().expect("it is not ours").to_string();
        assert!(error.contains(LOCK), "{error}");
    }
    for name in ["precious", "file/.pillion.lock"] {
        assert_eq!(fs::read_to_string(place.path().join(name)).unwrap(), "mine");
    }
}

#[test]
fn a_folder_that_another_run_has_taken_is_lost() {
    let place = tempfile::tempdir().unwrap();
    let out = place.path().join("out");
    let mut first = RunFolder::claim(&out).unwrap();
    first.restore().unwrap();
    fs::remove_dir_all(&out).unwrap();
    assert!(!first.is_lost(), "nobody has it");
    first.restore().unwrap();
    assert!(out.join(LOCK).exists() && !first.is_lost());
    fs::remove_dir_all(&out).unwrap();
    let second = RunFolder::claim(&out).unwrap();
    assert!(first.is_lost());
    let error = first.restore().unwrap_err().to_string();
    assert!(error.contains("another run is writing here") && first.is_lost(), "{error}");
    drop(second);
    first.restore().unwrap();
    assert!(!first.is_lost());
}

#[test]
fn errors_of_file_systems_without_locks_are_known() {
    for (code, none) in [(38, true), (37, true), (95, true), (11, false), (5, false)] {
        assert_eq!(has_no_locks(&io::Error::from_raw_os_error(code)), none, "{code}");
    }
}
