//! Models in Hugging Face's format: in, out, and what is wrong with some. `ci/python` has
//! transformers read what comes out.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use half::{bf16, f16};
use pillion_tests::golden::Golden;
use pillion_tests::program::Workplace;
use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors};
use serde_json::{Value, json};

const PROGRAM: &str = env!("CARGO_BIN_EXE_pillion-under-test");

type Tensors = BTreeMap<String, (Dtype, Vec<usize>, Vec<u8>)>;

/// A golden file's model, as transformers saves it in this type, in one file or several.
fn write_model(place: &Workplace, folder: &str, name: &str, dtype: Dtype, files: usize) {
    let golden = Golden::load(name);
    let mut config = golden.metadata("config").clone();
    config["architectures"] = json!(["LlamaForCausalLM"]);
    let folder = place.path(folder);
    fs::create_dir(&folder).unwrap();
    write_json(&folder.join("config.json"), &config);
    let mut tensors = Tensors::new();
    for name in golden.names() {
        let Some(parameter) = name.strip_prefix("param.") else { continue };
        let bytes: Vec<u8> = match dtype {
            Dtype::BF16 => golden.f32(&name).iter().flat_map(|&x| bf16::from_f32(x).to_le_bytes()).collect(),
            Dtype::F16 => golden.f32(&name).iter().flat_map(|&x| f16::from_f32(x).to_le_bytes()).collect(),
            _ => golden.f32(&name).iter().flat_map(|x| x.to_le_bytes()).collect(),
        };
        tensors.insert(parameter.to_owned(), (dtype, golden.shape(&name), bytes));
    }
    write_tensors(&folder, &tensors, files);
}

fn write_json(path: &Path, value: &Value) {
    fs::write(path, value.to_string()).unwrap();
}

fn write_tensors(folder: &Path, tensors: &Tensors, files: usize) {
    let all: Vec<_> = tensors.iter().collect();
    let mut map = BTreeMap::new();
    for (index, chunk) in all.chunks(all.len().div_ceil(files)).enumerate() {
        let file = if files == 1 { "model.safetensors".to_owned() } else { format!("model-{index}.safetensors") };
        let views = chunk.iter().map(|&(name, (dtype, shape, bytes))| {
            map.insert(name.clone(), json!(file));
            (name.clone(), TensorView::new(*dtype, shape.clone(), bytes).unwrap())
        });
        fs::write(folder.join(&file), safetensors::serialize(views.collect::<Vec<_>>(), None).unwrap()).unwrap();
    }
    if files > 1 {
        write_json(&folder.join("model.safetensors.index.json"), &json!({ "metadata": {}, "weight_map": map }));
    }
}

/// Every tensor of a folder.
fn tensors(folder: &Path) -> Tensors {
    let mut found = Tensors::new();
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_some_and(|ending| ending == "safetensors") {
            let bytes = fs::read(&path).unwrap();
            for (name, view) in SafeTensors::deserialize(&bytes).unwrap().tensors() {
                let twice = found.insert(name, (view.dtype(), view.shape().to_vec(), view.data().to_vec()));
                assert!(twice.is_none());
            }
        }
    }
    found
}

fn files(folder: &Path) -> Vec<String> {
    let entries = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap());
    let mut names: Vec<String> = entries.collect();
    names.sort();
    names
}

#[test]
fn an_export_of_an_import_has_the_same_bits() {
    let place = Workplace::new(PROGRAM);
    for (model, dtype, parts, size) in
        [("relative", Dtype::BF16, 1, "5GB"), ("relative", Dtype::F32, 3, "10kB"), ("gqa", Dtype::F16, 2, "20kB")]
    {
        let name = format!("{model}-{parts}");
        write_model(&place, &name, model, dtype, parts);
        place.run(&format!("import {name} --out run-{name}")).succeeded();
        place.run(&format!("export --checkpoint run-{name} --to out-{name} --file-size {size}")).succeeded();
        assert!(tensors(&place.path(&name)) == tensors(&place.path(format!("out-{name}"))), "{name}");
        let read = |folder: &str| -> Value {
            serde_json::from_str(&fs::read_to_string(place.path(folder).join("config.json")).unwrap()).unwrap()
        };
        let (before, after) = (read(&name), read(&format!("out-{name}")));
        for (key, value) in before.as_object().unwrap() {
            assert_eq!(&after[key], value, "{key} of {name}");
        }
    }
    // Types that differ within a model, too.
    write_model(&place, "mixed", "mha", Dtype::BF16, 1);
    let mut mixed = tensors(&place.path("mixed"));
    let (dtype, shape, bytes) = mixed["model.norm.weight"].clone();
    assert_eq!(dtype, Dtype::BF16);
    let (narrow, _) = bytes.as_chunks::<2>();
    let wide = narrow.iter().flat_map(|&x| (bf16::from_le_bytes(x).to_f32() + 1e-4).to_le_bytes()).collect();
    mixed.insert("model.norm.weight".to_owned(), (Dtype::F32, shape, wide));
    write_tensors(&place.path("mixed"), &mixed, 1);
    place.run("import mixed --out run-mixed").succeeded();
    place.run("export --checkpoint run-mixed --to out-mixed").succeeded();
    assert!(tensors(&place.path("out-mixed")) == mixed);
    // Another type is asked for.
    place.run("export --checkpoint run-mixed --to out-f32 --dtype f32").succeeded();
    assert!(tensors(&place.path("out-f32")).values().all(|(dtype, ..)| *dtype == Dtype::F32));
}

#[test]
fn an_imported_model_is_trained_in_any_placement_and_goes_out_again() {
    let place = Workplace::new(PROGRAM);
    // A model that knows all bytes.
    place.train("bytes", "--ranks 1 --steps 20");
    place.run("export --checkpoint bytes --to model --dtype bf16").succeeded();
    assert_eq!(
        files(&place.path("model")),
        ["config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]
    );
    place.run("import model --out imported").succeeded();
    let tail = "--from imported --samples 16 --validation-samples 8 --seq 32 --sample 0 --controller constant";
    let losses = |flags: &str, out: &str| {
        place.run(&format!("train --data text --out {out} {flags} {tail}")).succeeded();
        place.steps(out).into_iter().map(|step| step.loss).collect::<Vec<_>>()
    };
    let alone = losses("--ranks 1 --round-to 8", "one");
    assert_eq!(alone.len(), 2);
    // It begins where the run ended, but for the rounding to bf16, and not where a new one does.
    let tail_of = |from: &str| tail.replace("--from imported", from);
    let first = |from: &str, out: &str| {
        let flags = format!("train --data text --out {out} --ranks 1 --round-to 8 {}", tail_of(from));
        place.run(&flags).succeeded();
        place.steps(out)[0].loss
    };
    let (ended, new) = (first("--from bytes", "exact"), first("--model tiny", "new"));
    assert!((alone[0] - ended).abs() < 0.05 * (new - ended), "{} of {ended} and {new}", alone[0]);
    for (flags, out) in [
        ("--ranks 2", "two"),
        ("--ranks 2 --shard zero-1", "first"),
        ("--ranks 2 --launch threads --mesh replicate=2,shard=1", "whole"),
        ("--ranks 2 --gather copy --bucket 64KiB", "copied"),
    ] {
        let others = losses(flags, out);
        let apart = alone.iter().zip(&others).map(|(a, b)| (a - b).abs() / a).fold(0.0, f64::max);
        // Sums in another order.
        assert!(apart < 1e-5, "{flags}: {alone:?} {others:?}");
    }
    // What it began with goes along: the tokenizer, and through a resume elsewhere.
    place.run("train --resume two/checkpoints/step-00000002 --out three --change samples --samples 24").succeeded();
    place.run("export --checkpoint three --to out").succeeded();
    assert_eq!(
        fs::read(place.path("out/tokenizer.json")).unwrap(),
        fs::read(place.path("model/tokenizer.json")).unwrap()
    );
    place.run(&format!("train --data text --model tiny {tail}")).refused(2, &["--from", "--model"]);
    place.run("train --data text --from nowhere").refused(1, &["nowhere", "no whole checkpoint"]);
}

#[test]
fn what_is_wrong_with_a_model_is_said_in_one_line_and_leaves_nothing() {
    let place = Workplace::new(PROGRAM);
    write_model(&place, "good", "mha", Dtype::F32, 1);
    let config: Value = serde_json::from_str(&fs::read_to_string(place.path("good/config.json")).unwrap()).unwrap();
    let good = tensors(&place.path("good"));
    let refuse = |what: &str, config: &Value, tensors: &Tensors, parts: &[&str]| {
        let folder = place.path("bad");
        fs::create_dir(&folder).unwrap();
        write_json(&folder.join("config.json"), config);
        write_tensors(&folder, tensors, 1);
        println!("{what}");
        place.run("import bad --out new").refused(1, parts);
        assert!(!place.path("new").exists(), "{what} leaves a folder");
        fs::remove_dir_all(&folder).unwrap();
    };
    let changed = |key: &str, value: Value| {
        let mut config = config.clone();
        config[key] = value;
        config
    };
    let with = |change: &dyn Fn(&mut Tensors)| {
        let mut tensors = good.clone();
        change(&mut tensors);
        tensors
    };
    refuse("another architecture", &changed("model_type", json!("gpt2")), &good, &["config.json", "gpt2"]);
    refuse("an unknown key", &changed("sliding_window", json!(9)), &good, &["`sliding_window`", "remove it"]);
    refuse("a missing key", &changed("hidden_size", Value::Null), &good, &["lacks the key `hidden_size`"]);
    refuse("a shape", &changed("vocab_size", json!(62)), &good, &["has the shape [61, 32]", "[62, 32]"]);
    refuse("tied", &changed("tie_word_embeddings", json!(true)), &good, &["tie_word_embeddings", "not the embedding"]);
    let missing = with(&|tensors| drop(tensors.remove("model.layers.1.mlp.up_proj.weight")));
    refuse("a missing tensor", &config, &missing, &["no tensor model.layers.1.mlp.up_proj.weight"]);
    let more = with(&|tensors| {
        tensors.insert("model.layers.0.self_attn.q_proj.bias".to_owned(), (Dtype::F32, vec![32], vec![0; 128]));
    });
    refuse("one too many", &config, &more, &["q_proj.bias", "has not"]);
    let narrow = with(&|tensors| {
        tensors.insert("model.norm.weight".to_owned(), (Dtype::U8, vec![32], vec![0; 32]));
    });
    refuse("a type", &config, &narrow, &["model.norm.weight", "F32, BF16 or F16"]);
    // What follows from other tensors is left out, and said.
    let angles = with(&|tensors| {
        let name = "model.layers.0.self_attn.rotary_emb.inv_freq";
        tensors.insert(name.to_owned(), (Dtype::F32, vec![4], vec![0; 16]));
    });
    write_tensors(&place.path("good"), &angles, 1);
    let imported = place.run("import good --out angles").succeeded();
    assert!(imported.stdout.contains("inv_freq follows from other tensors"), "{imported}");
    // A file that is cut short, none, and a folder of another kind.
    let path = place.path("good/model.safetensors");
    let bytes = fs::read(&path).unwrap();
    fs::write(&path, &bytes[..bytes.len() - 1]).unwrap();
    place.run("import good --out new").refused(1, &["model.safetensors", "bytes follow its header"]);
    fs::write(&path, &bytes[..4]).unwrap();
    place.run("import good --out new").refused(1, &["model.safetensors", "damaged"]);
    fs::rename(&path, place.path("good/pytorch_model.bin")).unwrap();
    place.run("import good --out new").refused(1, &["pytorch_model.bin", "save_pretrained"]);
    place.run("import text --out new").refused(1, &["text/config.json", "give the folder of a model"]);
    place.run("import nowhere --out new").refused(1, &["nowhere", "no such folder"]);
    assert!(!place.path("new").exists());
    // Ways out.
    place.run("export --checkpoint angles --to angles").refused(1, &["angles", "exists already"]);
    place.run("export --checkpoint nowhere --to new").refused(1, &["nowhere", "no whole checkpoint"]);
    let shard = place.path("angles/checkpoints/step-00000000/rank-00000-of-00001.safetensors");
    let mut bytes = fs::read(&shard).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    fs::write(&shard, bytes).unwrap();
    place.run("export --checkpoint angles --to new").refused(1, &["rank-00000-of-00001", "damaged"]);
    assert!(!place.path("new").exists() && !files(&place.path(".")).iter().any(|name| name.contains("incomplete")));
}
