//! `config.json`: the shape of a model, as Hugging Face's transformers 4 and 5 write it.

use pillion_kernels::DType;
use serde_json::{Map, Value, json};

use super::plain;
use crate::RopeScaling;
use crate::config::Config;

/// Keys that change no number of a forward pass of this architecture. Those of all models that
/// begin with `_` are such, too.
#[rustfmt::skip]
const INERT: [&str; 54] = [
    "add_cross_attention", "architectures", "attention_dropout", "auto_map", "bad_words_ids",
    "begin_suppress_tokens", "bos_token_id", "chunk_size_feed_forward", "cross_attention_hidden_size",
    "decoder_start_token_id", "diversity_penalty", "do_sample", "dtype", "early_stopping",
    "encoder_no_repeat_ngram_size", "eos_token_id", "exponential_decay_length_penalty",
    "finetuning_task", "forced_bos_token_id", "forced_eos_token_id", "id2label",
    "initializer_range", "is_decoder", "is_encoder_decoder", "label2id", "length_penalty",
    "max_length", "max_position_embeddings", "min_length", "model_type", "no_repeat_ngram_size",
    "num_beam_groups", "num_beams", "num_return_sequences", "output_attentions",
    "output_hidden_states", "output_scores", "pad_token_id", "prefix", "pretraining_tp",
    "problem_type", "pruned_heads", "remove_invalid_values", "repetition_penalty", "return_dict",
    "return_dict_in_generate", "sep_token_id", "suppress_tokens", "task_specific_params",
    "temperature", "torch_dtype", "torchscript", "transformers_version", "use_cache",
];

/// Reads a configuration.
///
/// # Errors
/// Says which key is missing, unknown, or asks for what Pillion does not compute.
pub fn parse_config(text: &str) -> Result<Config, String> {
    parse(text).map_err(|problem| plain(&problem))
}

fn parse(text: &str) -> Result<Config, String> {
    let value: Value = serde_json::from_str(text).map_err(|error| format!("is no JSON: {error}"))?;
    let Value::Object(map) = value else { return Err("is no JSON object".to_owned()) };
    let mut keys = Keys(map);
    let kind = keys.0.get("model_type").cloned().unwrap_or(Value::Null);
    if kind != "llama" {
        return Err(format!("is of the architecture {kind}, but Pillion computes \"llama\" alone"));
    }
    if keys.take("quantization_config").is_some() {
        return Err("has quantized weights: use the model they were made from".to_owned());
    }
    keys.expect("hidden_act", &json!("silu"))?;
    keys.expect("attention_bias", &json!(false))?;
    keys.expect("mlp_bias", &json!(false))?;
    let heads = keys.required("num_attention_heads")?;
    let mut config = Config {
        vocab_size: keys.required("vocab_size")?,
        hidden_size: keys.required("hidden_size")?,
        intermediate_size: keys.required("intermediate_size")?,
        num_hidden_layers: keys.required("num_hidden_layers")?,
        num_attention_heads: heads,
        num_key_value_heads: keys.size("num_key_value_heads")?.unwrap_or(heads),
        rms_norm_eps: keys.number("rms_norm_eps")?.unwrap_or(1e-6) as f32,
        rope_theta: 10_000.0,
        rope_scaling: None,
        head_dim: keys.size("head_dim")?,
        tie_word_embeddings: keys.flag("tie_word_embeddings")?,
    };
    config.rope_theta = keys.number("rope_theta")?.unwrap_or(config.rope_theta);
    // Transformers 5 has both in one object, whose scaling may be none.
    for key in ["rope_scaling", "rope_parameters"] {
        if let Some(scaling) = keys.object(key)? {
            read_rope(scaling, &mut config).map_err(|what| format!("has a `{key}` that {what}"))?;
        }
    }
    if let Some(unknown) = keys.0.keys().find(|key| !key.starts_with('_') && !INERT.contains(&key.as_str())) {
        return Err(format!(
            "has the key `{unknown}`, which Pillion does not know: remove it if it changes no number of the model"
        ));
    }
    // The width that it would have anyway is not kept, so that equal models have equal shapes.
    if config.head_dim.is_some_and(|width| width.checked_mul(heads) == Some(config.hidden_size)) {
        config.head_dim = None;
    }
    config.validate().map_err(|error| format!("cannot be: {error}"))?;
    Ok(config)
}

/// Reads the object about rotary angles, of transformers 4 or 5.
fn read_rope(mut scaling: Map<String, Value>, config: &mut Config) -> Result<(), String> {
    if let Some(theta) = scaling.remove("rope_theta") {
        config.rope_theta = theta.as_f64().ok_or_else(|| format!("has the rope_theta {theta}, which is no number"))?;
    }
    let older = scaling.remove("type");
    let kind = scaling.remove("rope_type").or(older).unwrap_or(json!("default"));
    if kind == "default" {
        return match scaling.keys().next() {
            None => Ok(()),
            Some(key) => Err(format!("has the key `{key}`, but no rope_type that uses it")),
        };
    }
    scaling.insert("rope_type".to_owned(), kind.clone());
    let parsed = serde_json::from_value::<RopeScaling>(Value::Object(scaling));
    config.rope_scaling = Some(parsed.map_err(|error| {
        format!("Pillion does not compute ({error}); it computes \"default\", \"linear\" and \"llama3\"")
    })?);
    Ok(())
}

/// The text of a configuration: `original` (of the model that this one began as) with this model's
/// shape, and weights of type `dtype`.
pub fn write_config(config: &Config, original: Option<&Map<String, Value>>, dtype: DType) -> String {
    let mut map = original.cloned().unwrap_or_default();
    let Value::Object(shape) = serde_json::to_value(config).expect("plain values") else { unreachable!("a struct") };
    for key in ["rope_parameters", "rope_scaling", "dtype", "torch_dtype"] {
        map.remove(key);
    }
    map.extend(shape);
    // A float of 32 bits, in as few digits as say which.
    map.insert("rms_norm_eps".to_owned(), json!(config.rms_norm_eps.to_string().parse::<f64>().expect("a number")));
    map.insert("head_dim".to_owned(), json!(config.head_dim()));
    map.insert("tie_word_embeddings".to_owned(), json!(config.tie_word_embeddings));
    let name = match dtype {
        DType::Bf16 => "bfloat16",
        DType::F16 => "float16",
        _ => "float32",
    };
    map.insert("torch_dtype".to_owned(), json!(name));
    for (key, value) in [
        ("architectures", json!(["LlamaForCausalLM"])),
        ("model_type", json!("llama")),
        ("hidden_act", json!("silu")),
        ("attention_bias", json!(false)),
        ("mlp_bias", json!(false)),
    ] {
        map.entry(key).or_insert(value);
    }
    let mut text = serde_json::to_string_pretty(&Value::Object(map)).expect("plain values");
    text.push('\n');
    text
}

/// The keys that have not been read yet.
struct Keys(Map<String, Value>);

impl Keys {
    /// Takes a value; none where there is none, or null.
    fn take(&mut self, key: &str) -> Option<Value> {
        self.0.remove(key).filter(|value| !value.is_null())
    }

    fn size(&mut self, key: &str) -> Result<Option<usize>, String> {
        let Some(value) = self.take(key) else { return Ok(None) };
        let size = value.as_u64().and_then(|size| usize::try_from(size).ok());
        size.map(Some).ok_or_else(|| format!("has the {key} {value}, which is no size"))
    }

    fn required(&mut self, key: &str) -> Result<usize, String> {
        self.size(key)?.ok_or_else(|| format!("lacks the key `{key}`"))
    }

    fn number(&mut self, key: &str) -> Result<Option<f64>, String> {
        let Some(value) = self.take(key) else { return Ok(None) };
        value.as_f64().map(Some).ok_or_else(|| format!("has the {key} {value}, which is no number"))
    }

    fn flag(&mut self, key: &str) -> Result<bool, String> {
        let Some(value) = self.take(key) else { return Ok(false) };
        value.as_bool().ok_or_else(|| format!("has the {key} {value}, which is neither true nor false"))
    }

    fn object(&mut self, key: &str) -> Result<Option<Map<String, Value>>, String> {
        match self.take(key) {
            None => Ok(None),
            Some(Value::Object(map)) => Ok(Some(map)),
            Some(value) => Err(format!("has the {key} {value}, which is no object")),
        }
    }

    /// Takes a value that can only be this.
    fn expect(&mut self, key: &str, only: &Value) -> Result<(), String> {
        match self.take(key) {
            Some(value) if &value != only => Err(format!("has {key} = {value}, but Pillion computes {only} alone")),
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::PRESETS;

    /// As transformers 4 writes Llama 3.1's.
    fn llama31() -> Value {
        json!({
            "architectures": ["LlamaForCausalLM"], "attention_bias": false, "attention_dropout": 0.0,
            "bos_token_id": 128_000, "eos_token_id": [128_001, 128_008, 128_009], "hidden_act": "silu",
            "hidden_size": 4096, "initializer_range": 0.02, "intermediate_size": 14_336,
            "max_position_embeddings": 131_072, "mlp_bias": false, "model_type": "llama",
            "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 8,
            "pretraining_tp": 1, "rms_norm_eps": 1e-05,
            "rope_scaling": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                             "original_max_position_embeddings": 8192, "rope_type": "llama3"},
            "rope_theta": 500_000.0, "tie_word_embeddings": false, "torch_dtype": "bfloat16",
            "transformers_version": "4.43.0", "use_cache": true, "vocab_size": 128_256,
        })
    }

    #[test]
    fn llama_3_1_is_the_preset_and_so_it_is_as_transformers_5_writes_it() {
        let preset = crate::config::Preset::named("llama3.1-8b").unwrap().config();
        assert_eq!(parse_config(&llama31().to_string()).unwrap(), preset);
        let mut newer = llama31();
        let map = newer.as_object_mut().unwrap();
        let mut rope = map.remove("rope_scaling").unwrap();
        rope["rope_theta"] = map.remove("rope_theta").unwrap();
        map.insert("rope_parameters".to_owned(), rope);
        map.insert("head_dim".to_owned(), json!(128));
        assert_eq!(parse_config(&newer.to_string()).unwrap(), preset);
        newer["rope_parameters"] = json!({"rope_theta": 7.0, "rope_type": "default"});
        let plain = Config { rope_theta: 7.0, rope_scaling: None, ..preset };
        assert_eq!(parse_config(&newer.to_string()).unwrap(), plain);
    }

    #[test]
    fn what_is_written_is_read_and_keeps_what_the_original_says() {
        for preset in PRESETS {
            let wide = Config { head_dim: Some(6), rms_norm_eps: 3e-6, ..preset.config() };
            for config in [preset.config(), wide] {
                assert_eq!(parse_config(&write_config(&config, None, DType::F32)).unwrap(), config);
            }
        }
        let original = llama31();
        let config = parse_config(&original.to_string()).unwrap();
        let written: Value = serde_json::from_str(&write_config(&config, original.as_object(), DType::F16)).unwrap();
        for (key, value) in original.as_object().unwrap() {
            let expected = if key == "torch_dtype" { &json!("float16") } else { value };
            assert_eq!(&written[key], expected, "{key}");
        }
    }

    #[test]
    fn what_pillion_does_not_compute_is_named() {
        let changes = [
            ("model_type", json!("mistral"), "architecture \"mistral\""),
            ("model_type", Value::Null, "architecture null"),
            ("hidden_act", json!("gelu"), "hidden_act = \"gelu\""),
            ("attention_bias", json!(true), "attention_bias = true"),
            ("quantization_config", json!({}), "quantized"),
            ("sliding_window", json!(4096), "`sliding_window`, which Pillion does not know"),
            ("vocab_size", Value::Null, "lacks the key `vocab_size`"),
            ("hidden_size", json!(-4), "hidden_size -4, which is no size"),
            ("num_attention_heads", json!(5), "does not divide"),
            ("rms_norm_eps", json!("small"), "no number"),
            ("rope_scaling", json!({"rope_type": "yarn", "factor": 4.0}), "yarn"),
            ("rope_scaling", json!({"rope_type": "llama3", "factor": 4.0}), "low_freq_factor"),
            ("rope_scaling", json!({"type": "linear", "factor": 0.0}), "factor 0"),
            ("rope_scaling", json!({"factor": 2.0}), "no rope_type"),
            ("tie_word_embeddings", json!(1), "neither true nor false"),
        ];
        for (key, value, words) in changes {
            let mut changed = llama31();
            changed[key] = value;
            let error = parse_config(&changed.to_string()).unwrap_err();
            assert!(error.contains(words), "{key}: {error}");
        }
        assert!(parse_config("{").unwrap_err().contains("no JSON"));
        assert!(parse_config("[]").unwrap_err().contains("no JSON object"));
    }
}
