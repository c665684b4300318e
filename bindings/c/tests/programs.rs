//! Programs in C and C++ compile without a warning, and their ranks agree.

use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

/// Where cargo has put the library.
fn library() -> PathBuf {
    let deps = std::env::current_exe().unwrap().parent().unwrap().to_owned();
    let folders = [deps.clone(), deps.parent().unwrap().to_owned()];
    let found = folders.iter().find(|folder| folder.join("libpillion.so").exists());
    found.unwrap_or_else(|| panic!("no libpillion.so in {folders:?}")).clone()
}

fn compile(compiler: &str, flags: &[&str], source: &str, out: &Path) {
    let (folder, library) = (Path::new(env!("CARGO_MANIFEST_DIR")), library());
    let mut command = Command::new(compiler);
    command
        .args(["-Wall", "-Wextra", "-Werror", "-g", "-O1"])
        .args(flags)
        .arg(folder.join(source))
        .arg("-I")
        .arg(folder);
    command.arg("-L").arg(&library).args(["-lpillion", "-lm"]).arg(format!("-Wl,-rpath,{}", library.display()));
    let output = command.arg("-o").arg(out).output().unwrap();
    assert!(output.status.success(), "{source}: {}", String::from_utf8_lossy(&output.stderr));
}

/// Runs a program as ranks that torchrun would have started.
fn run(program: &Path, ranks: usize, arguments: &[&str]) -> Vec<Output> {
    run_under(&[], program, ranks, arguments)
}

/// As [`run`], started by a program that watches them.
fn run_under(watcher: &[&str], program: &Path, ranks: usize, arguments: &[&str]) -> Vec<Output> {
    let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port().to_string();
    let job = format!("c-{}-{port}", std::process::id());
    let (world, mut children) = (ranks.to_string(), Vec::new());
    for rank in (0..ranks).map(|rank| rank.to_string()) {
        let variables = [
            ("RANK", rank.as_str()),
            ("WORLD_SIZE", &world),
            ("LOCAL_RANK", &rank),
            ("LOCAL_WORLD_SIZE", &world),
            ("MASTER_ADDR", "127.0.0.1"),
            ("MASTER_PORT", &port),
            ("TORCHELASTIC_RUN_ID", &job),
        ];
        let mut words = watcher.iter().map(std::ffi::OsStr::new).chain([program.as_os_str()]);
        let mut command = Command::new(words.next().expect("a program at least"));
        // Cargo's own list may begin with a folder that has an older library.
        command.env("LD_LIBRARY_PATH", library());
        command.args(words).args(arguments).envs(variables).stdout(Stdio::piped()).stderr(Stdio::piped());
        children.push(command.spawn().unwrap());
    }
    children.into_iter().map(|child| child.wait_with_output().unwrap()).collect()
}

/// Rust needs a C compiler, and nothing here a C++ compiler but these tests; `ci/run` installs one.
fn has_cpp() -> bool {
    let has = Command::new("c++").arg("--version").output().is_ok();
    if !has {
        eprintln!("no C++ compiler, so nobody has tried the header in C++");
    }
    has
}

#[track_caller]
fn all_well(outputs: &[Output]) {
    let said = outputs.iter().map(|output| format!("{}: {}", output.status, String::from_utf8_lossy(&output.stderr)));
    let said: Vec<String> = said.collect();
    assert!(outputs.iter().all(|output| output.status.success()), "{}", said.join("\n"));
}

#[test]
fn the_example_compiles_as_c_and_as_cpp_and_its_ranks_agree() {
    let folder = tempfile::tempdir().unwrap();
    for (compiler, flags) in [("cc", ["-std=c99", "-pedantic"]), ("c++", ["-std=c++17", "-xc++"])] {
        if compiler == "c++" && !has_cpp() {
            continue;
        }
        let program = folder.path().join(compiler);
        compile(compiler, &flags, "examples/mean.c", &program);
        for ranks in [1, 2] {
            let outputs = run(&program, ranks, &[]);
            all_well(&outputs);
            let said = String::from_utf8_lossy(&outputs[0].stdout);
            assert_eq!(said, format!("the mean over {ranks} ranks is right\n"));
        }
    }
}

/// The last line that rank 0 prints, of an example that fails by itself where it has not learned.
fn last_line(program: &Path, ranks: usize, arguments: &[&str]) -> String {
    let outputs = run(program, ranks, arguments);
    all_well(&outputs);
    String::from_utf8_lossy(&outputs[0].stdout).lines().last().unwrap().to_owned()
}

#[test]
fn a_trainer_with_two_arrays_learns_on_any_number_of_ranks() {
    let folder = tempfile::tempdir().unwrap();
    let program = folder.path().join("zero1");
    compile("cc", &["-std=c99", "-pedantic"], "examples/zero1.c", &program);
    for ranks in [1, 2, 3] {
        assert!(last_line(&program, ranks, &[]).starts_with("step 600"));
    }
}

#[test]
fn a_trainer_in_cpp_learns_and_saves() {
    if !has_cpp() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let program = folder.path().join("trainer");
    compile("c++", &["-std=c++17", "-pedantic"], "examples/trainer.cpp", &program);
    let saved = folder.path().join("saved");
    std::fs::create_dir(&saved).unwrap();
    let one = last_line(&program, 1, &[saved.to_str().unwrap()]);
    assert!(saved.join("step-300").exists() || std::fs::read_dir(&saved).unwrap().count() == 1, "{one}");
    for ranks in [2, 3] {
        assert!(last_line(&program, ranks, &[]).starts_with("step 300"));
    }
}

/// Every read and write of the programs and of the library, and every block that is left at the
/// end.
#[test]
fn valgrind_finds_nothing() {
    if Command::new("valgrind").arg("--version").output().is_err() {
        eprintln!("SKIPPED: there is no valgrind (Debian: valgrind)");
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    // It knows no AVX-512.
    let isa = "PILLION_ISA=avx2";
    let leaks = ["--leak-check=full", "--show-leak-kinds=definite", "--errors-for-leak-kinds=definite"];
    let watcher = [&["env", isa, "valgrind", "--quiet", "--error-exitcode=9"][..], &leaks].concat();
    for (source, arguments) in [("tests/check.c", &[][..]), ("tests/training.c", &["saved"])] {
        let program = folder.path().join("program");
        compile("cc", &["-std=c11"], source, &program);
        let saved = folder.path().join("saved");
        std::fs::create_dir_all(&saved).unwrap();
        let arguments: Vec<&str> = arguments.iter().map(|_| saved.to_str().unwrap()).collect();
        all_well(&run_under(&watcher, &program, 2, &arguments));
    }
}

/// What the programs do with the library's memory, and what both leave at the end.
#[test]
fn address_sanitizer_finds_nothing() {
    let folder = tempfile::tempdir().unwrap();
    for (source, has_folder) in [("tests/check.c", false), ("tests/training.c", true), ("examples/zero1.c", false)] {
        let (program, saved) = (folder.path().join("program"), tempfile::tempdir().unwrap());
        compile("cc", &["-std=c11", "-fsanitize=address,undefined", "-fno-sanitize-recover"], source, &program);
        let arguments: &[&str] = if has_folder { &[saved.path().to_str().unwrap()] } else { &[] };
        all_well(&run(&program, 2, arguments));
    }
}

#[test]
fn engines_and_two_arrays_give_the_same_parameters() {
    let folder = tempfile::tempdir().unwrap();
    let program = folder.path().join("training");
    compile("cc", &["-std=c11"], "tests/training.c", &program);
    for ranks in [1, 2, 3] {
        let saved = tempfile::tempdir().unwrap();
        all_well(&run(&program, ranks, &[saved.path().to_str().unwrap()]));
    }
}

#[test]
fn a_program_with_the_static_library_needs_no_other() {
    let folder = tempfile::tempdir().unwrap();
    let program = folder.path().join("mean");
    let source = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut command = Command::new("cc");
    command.arg(source.join("examples/mean.c")).arg("-I").arg(source).arg(library().join("libpillion.a"));
    // What Rust's own library asks of the system.
    let output = command.args(["-lm", "-lpthread", "-ldl", "-lgcc_s", "-o"]).arg(&program).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    all_well(&run(&program, 2, &[]));
}

#[test]
fn two_copies_in_one_process_and_forks() {
    let folder = tempfile::tempdir().unwrap();
    let (program, library) = (folder.path().join("versions"), library().join("libpillion.so"));
    compile("cc", &["-std=gnu11", "-ldl"], "tests/versions.c", &program);
    let copies = ["one.so", "other.so"].map(|name| {
        let copy = folder.path().join(name);
        std::fs::copy(&library, &copy).unwrap();
        copy.to_str().unwrap().to_owned()
    });
    all_well(&run(&program, 2, &[&copies[0], &copies[1]]));
}

#[test]
fn every_operation_and_every_bad_argument_as_a_c_program_calls_them() {
    let folder = tempfile::tempdir().unwrap();
    let program = folder.path().join("check");
    compile("cc", &["-std=c11", "-O1"], "tests/check.c", &program);
    for ranks in [1, 2, 3] {
        all_well(&run(&program, ranks, &[]));
        let store = tempfile::tempdir().unwrap();
        all_well(&run(&program, ranks, &[store.path().to_str().unwrap()]));
    }
}
