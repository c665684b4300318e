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
    command.args(["-Wall", "-Wextra", "-Werror", "-g"]).args(flags).arg(folder.join(source)).arg("-I").arg(folder);
    command.arg("-L").arg(&library).arg("-lpillion").arg(format!("-Wl,-rpath,{}", library.display()));
    let output = command.arg("-o").arg(out).output().unwrap();
    assert!(output.status.success(), "{source}: {}", String::from_utf8_lossy(&output.stderr));
}

/// Runs a program as ranks that torchrun would have started.
fn run(program: &Path, ranks: usize, arguments: &[&str]) -> Vec<Output> {
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
        let mut command = Command::new(program);
        command.args(arguments).envs(variables).stdout(Stdio::piped()).stderr(Stdio::piped());
        children.push(command.spawn().unwrap());
    }
    children.into_iter().map(|child| child.wait_with_output().unwrap()).collect()
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
        // Rust needs a C compiler, and nothing here a C++ compiler but this; `ci/run` installs one.
        if compiler == "c++" && Command::new(compiler).arg("--version").output().is_err() {
            eprintln!("no C++ compiler, so nobody has tried the header in C++");
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
