use super::*;

fn parse(line: &str) -> Result<Settings, String> {
    let arguments = Arguments::try_parse_from(["collbench"].into_iter().chain(line.split_whitespace()));
    arguments.map_err(|error| error.to_string())?.settings().map_err(|error| error.to_string())
}

#[test]
fn sizes_are_multiplied_until_the_largest() {
    assert_eq!(parse("all-reduce -b 8 -e 1K -f 4").unwrap().sizes, [8, 32, 128, 512]);
    assert_eq!(parse("all-reduce -b 0 -e 0").unwrap().sizes, [0]);
    assert_eq!(parse("all-reduce --sizes 0,4,1k").unwrap().sizes, [0, 4, 1024]);
    let default = parse("all-reduce").unwrap().sizes;
    assert_eq!((default[0], *default.last().unwrap()), (8, 16 << 20), "8 · 8⁷; 8 · 8⁸ is more than 64 MiB");
}

#[test]
fn habits_of_nccl_tests_and_of_osu_are_accepted() {
    let nccl = parse("all-reduce -b 8 -e 128M -f 2 -g 4 -c 1 -n 10 -w 3 -d float -o sum -T 30").unwrap();
    assert_eq!((nccl.ranks, nccl.check, nccl.iterations, nccl.warmup), (Some(4), true, 10, 3));
    assert_eq!((nccl.sizes.len(), nccl.options.timeout), (25, Duration::from_secs(30)));
    assert!(!parse("all-reduce -c 0").unwrap().check);
    for (name, dtype) in [("double", DType::F64), ("bfloat16", DType::Bf16), ("half", DType::F16), ("F32", DType::F32)]
    {
        assert_eq!(parse(&format!("all-reduce -d {name}")).unwrap().dtypes, [dtype]);
    }
    let osu = parse("all-reduce -m 4:1K -f 4 -x 7").unwrap();
    assert_eq!((osu.sizes, osu.warmup), (vec![4, 16, 64, 256, 1024], 7));
    assert_eq!(parse("all-reduce -m 1M: -f 8").unwrap().sizes, [1 << 20, 8 << 20, 64 << 20]);
    assert_eq!(parse("all-reduce -m :64 -f 8").unwrap().sizes, [8, 64]);
}

#[test]
fn habits_that_mean_something_else_are_answered_with_the_flag() {
    for (line, words) in [
        ("all-reduce -t 2", "--threads -r 2"),
        ("all-reduce -d quarter", "f32, bf16, f16, f64"),
        ("all-reduce -i 100", "iterations are -n 100"),
        ("all-reduce -i 1M", "--sizes"),
        ("all-reduce -m 128", "-e 128"),
        ("all-reduce -m 2:x", "expected bytes"),
        ("all-reduce -m 8:64 -b 8", "-m and -b"),
        ("barrier -m 8:64", "no size"),
        ("all-reduce -m 64:8", "-b 64 is more than -e 8"),
        ("all-reduce -a 1", "-a has no counterpart"),
        ("all-reduce -G 1", "-G has no counterpart"),
        ("all-reduce -r 0", "root 0"),
        ("all-reduce -c x", "-c"),
    ] {
        let error = parse(line).unwrap_err();
        assert!(error.contains(words), "{line}: {error}");
    }
}

#[test]
fn what_cannot_be_is_named() {
    for (line, words) in [
        ("all-reduse", "all-reduce"),
        ("all-reduce -b 2 -e 1", "-b 2 is more than -e 1"),
        ("all-reduce -f 1", "-f 1"),
        ("all-reduce -n 0", "-n 0"),
        ("all-reduce -r 0", "-r 0"),
        ("all-reduce -b 1X", "expected bytes"),
        ("all-reduce -b 99999999999G", "more than any machine"),
        ("all-reduce --sizes 4 -b 4", "cannot be used with"),
        ("all-reduce --reduce-groups 0", "--reduce-groups 0"),
        ("all-reduce --hosts 2", "--threads"),
        ("all-reduce --compare mpi --in-place", "--compare mpi"),
        ("all-reduce --bind socket", "socket"),
        ("window --compare mpi", "window has no counterpart"),
        ("all-gather -o max", "all-gather has no combination"),
        ("all-reduce -o band", "no band of f32"),
        ("all-reduce -o premul -t i32", "no premul of i32"),
        ("all-reduce -o avg -t bool", "no avg of bool"),
        ("barrier -b 8", "barrier has no size"),
        ("scalars -t f64", "scalars has no type"),
        ("gather --in-place", "gather has no form in place"),
        ("window --buffers arena", "window has no choice of buffers"),
        ("window --overlap", "window has no overlap"),
    ] {
        let error = parse(line).expect_err(line);
        assert!(error.contains(words), "{line}: {error}");
    }
}

#[test]
fn all_takes_every_flag() {
    let settings = parse("all -t all -o all --in-place --buffers private --overlap -r 4 --reduce-groups 2").unwrap();
    assert_eq!((settings.operations.len(), settings.dtypes.len(), settings.reductions.len()), (17, 11, 9));
}
