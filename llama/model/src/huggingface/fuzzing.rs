//! The parsers of models in Hugging Face's format, for the fuzz targets in `tests/fuzz`.
//!
//! Each module is a target: `seeds` are inputs to begin with, and `check` panics where the parser
//! breaks its promise.

use serde_json::{Map, Value};

use crate::config::Config;

/// A model of about a hundred parameters.
fn example() -> Config {
    Config {
        vocab_size: 3,
        hidden_size: 4,
        intermediate_size: 2,
        num_hidden_layers: 1,
        num_attention_heads: 2,
        num_key_value_heads: 1,
        rms_norm_eps: 1e-5,
        rope_theta: 10_000.0,
        rope_scaling: None,
        head_dim: None,
        tie_word_embeddings: false,
    }
}

/// A JSON object.
fn object(text: &[u8]) -> Option<Map<String, Value>> {
    serde_json::from_slice(text).ok()
}

/// An error can be printed as a line.
fn assert_is_line(error: &impl std::fmt::Display) {
    let text = error.to_string();
    assert!(!text.contains(char::is_control), "{text:?}");
}

/// A `config.json`.
pub mod config {
    use pillion_kernels::DType;
    use serde_json::json;

    use super::super::{parse_config, write_config};
    use super::{assert_is_line, object};
    use crate::config::PRESETS;

    /// Those of all presets, some with what transformers adds, in the manner of its version 5.
    pub fn seeds() -> Vec<Vec<u8>> {
        let written = PRESETS.map(|preset| write_config(&preset.config(), None, DType::Bf16).into_bytes());
        let newer = written.iter().map(|text| {
            let mut map = object(text).expect("an object");
            let mut rope = map.remove("rope_scaling").unwrap_or(json!({"rope_type": "default"}));
            rope["rope_theta"] = map.remove("rope_theta").expect("it is always written");
            map.insert("rope_parameters".to_owned(), rope);
            map.insert("dtype".to_owned(), map["torch_dtype"].clone());
            map.insert("pad_token_id".to_owned(), json!(null));
            map.insert("_attn_implementation".to_owned(), json!("eager"));
            serde_json::to_vec(&map).expect("plain values")
        });
        newer.chain(written.iter().cloned()).collect()
    }

    /// A shape that is read is written so that it is read again, with and without what else the
    /// file says.
    pub fn check(data: &[u8]) {
        let Ok(text) = str::from_utf8(data) else { return };
        match parse_config(text) {
            Err(problem) => assert_is_line(&problem),
            Ok(config) => {
                let original = object(data).expect("it has been read");
                for (original, dtype) in [(None, DType::F32), (Some(&original), DType::Bf16)] {
                    assert_eq!(parse_config(&write_config(&config, original, dtype)).as_ref(), Ok(&config));
                }
            }
        }
    }
}

/// A folder: `config.json`, `model.safetensors.index.json` and `model.safetensors`, with a byte of
/// zero after each of the first two. There is no index if it is empty.
pub mod files {
    use std::fs;

    use pillion_kernels::DType;
    use safetensors::Dtype;
    use safetensors::tensor::TensorView;
    use serde_json::{Value, json};

    use super::super::{CONFIG, INDEX, SINGLE, Source, named, parse_config, write_config};
    use super::{assert_is_line, example};
    use crate::config::Config;

    /// Layers of a model that is looked at. One of very many is refused for the tensors that it
    /// lacks, but the list of those is long.
    const LAYERS: usize = 16;

    /// Models with weights of one type and of two, with an index, with a head that is the embedding,
    /// and with angles.
    pub fn seeds() -> Vec<Vec<u8>> {
        let plain = example();
        let tied = Config { tie_word_embeddings: true, ..example() };
        let wide = Config { num_hidden_layers: 2, head_dim: Some(4), ..example() };
        let angles = ["model.layers.0.self_attn.rotary_emb.inv_freq"];
        vec![
            seed(&plain, &[Dtype::F32], &[], false),
            seed(&plain, &[Dtype::BF16, Dtype::F16], &[], true),
            seed(&tied, &[Dtype::BF16], &["lm_head.weight"], false),
            seed(&wide, &[Dtype::F16], &angles, true),
        ]
    }

    /// A model whose tensors have these types in turn, with `more` tensors of the shape of its head.
    fn seed(config: &Config, dtypes: &[Dtype], more: &[&str], with_index: bool) -> Vec<u8> {
        let tensors = config.units().into_iter().flat_map(|unit| unit.tensors);
        let more = more.iter().map(|&name| (name.to_owned(), vec![config.vocab_size, config.hidden_size]));
        let all: Vec<_> = tensors.map(|tensor| (tensor.name, tensor.shape)).chain(more).collect();
        let bytes = vec![0; 4 * all.iter().map(|(_, shape)| shape.iter().product::<usize>()).max().unwrap_or(0)];
        let view = |shape: &[usize], dtype: Dtype| {
            let length = shape.iter().product::<usize>() * dtype.bitsize() / 8;
            TensorView::new(dtype, shape.to_vec(), &bytes[..length]).expect("as long as its shape says")
        };
        let views = all.iter().zip(dtypes.iter().cycle());
        let views = views.map(|((name, shape), &dtype)| (name.clone(), view(shape, dtype)));
        let weights = safetensors::serialize(views, None).expect("tensors");
        let index = match with_index {
            true => {
                let map: serde_json::Map<String, Value> =
                    all.iter().map(|(name, _)| (name.clone(), json!(SINGLE))).collect();
                json!({"metadata": {}, "weight_map": map}).to_string()
            }
            false => String::new(),
        };
        let config = write_config(config, None, DType::F32);
        [config.as_bytes(), index.as_bytes(), &weights].join(&0)
    }

    /// A folder that opens has each tensor of its configuration, and nothing else, each as long as
    /// its shape and type say.
    pub fn check(data: &[u8]) {
        let mut files = data.splitn(3, |&byte| byte == 0);
        let [config, index, weights] = std::array::from_fn(|_| files.next().unwrap_or_default());
        let read = str::from_utf8(config).ok().and_then(|text| parse_config(text).ok());
        if read.is_some_and(|config| config.num_hidden_layers > LAYERS) {
            return;
        }
        let folder = tempfile::tempdir().expect("a folder");
        for (name, bytes) in [(CONFIG, config), (INDEX, index), (SINGLE, weights)] {
            if name != INDEX || !bytes.is_empty() {
                fs::write(folder.path().join(name), bytes).expect("a file in a folder of our own");
            }
        }
        let source = match Source::open(folder.path()) {
            Ok(source) => source,
            Err(error) => return assert_is_line(&error),
        };
        let mut sum = 0;
        for tensor in source.config.units().iter().flat_map(|unit| &unit.tensors) {
            let (dtype, mut bytes) = (source.dtype_of(&tensor.name), 0);
            let whole = named(dtype).bitsize() / 8;
            let read = source.for_each_piece(&tensor.name, |piece| {
                assert!(piece.len().is_multiple_of(whole));
                bytes += piece.len();
                Ok(())
            });
            read.expect("its place has been checked");
            assert_eq!(bytes, tensor.shape.iter().product::<usize>() * whole);
            assert!(source.dtype() == dtype || source.dtype() == DType::F32);
            sum += bytes as u64;
        }
        assert_eq!(source.bytes(), sum);
    }

    #[cfg(test)]
    mod tests {
        use super::*;

        #[test]
        fn seeds_are_whole_models() {
            for seed in seeds() {
                let files: Vec<&[u8]> = seed.splitn(3, |&byte| byte == 0).collect();
                let folder = tempfile::tempdir().unwrap();
                for (name, bytes) in [CONFIG, INDEX, SINGLE].into_iter().zip(files) {
                    if !bytes.is_empty() {
                        fs::write(folder.path().join(name), bytes).unwrap();
                    }
                }
                Source::open(folder.path()).unwrap();
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{config, files};

    #[test]
    fn every_seed_keeps_the_promises() {
        config::seeds().iter().for_each(|seed| config::check(seed));
        files::seeds().iter().for_each(|seed| files::check(seed));
    }
}
