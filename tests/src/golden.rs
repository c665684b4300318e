//! Reads the golden files in `tests/golden` (its README says what they hold).
//!
//! A file or tensor that is missing or of another type fails the test that asked for it: everything here panics with a reason.

use std::collections::BTreeMap;
use std::path::Path;

use safetensors::{Dtype, SafeTensors};
use serde_json::Value;

use crate::reference::{Config, Parameters};

/// A golden file in memory.
pub struct Golden {
    bytes: Vec<u8>,
    metadata: BTreeMap<String, Value>,
}

/// How far a tensor of the f32 run lies from the f64 run.
#[derive(Clone, Copy, Debug)]
pub struct Distance {
    /// The largest difference.
    pub max_abs: f64,
    /// The largest difference over the largest value of the f64 run.
    pub relative: f64,
    /// The Euclidean norm of the difference over that of the f64 run.
    pub rms: f64,
}

impl Distance {
    /// `make.py` writes distances with three digits, so a true one is at most this many times the one written.
    pub const ROUNDING: f64 = 1.005;
}

impl Golden {
    /// Reads `tests/golden/<name>.safetensors`.
    pub fn load(name: &str) -> Golden {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("golden").join(format!("{name}.safetensors"));
        let bytes = std::fs::read(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        let (_, header) = SafeTensors::read_metadata(&bytes).expect("a safetensors file");
        let metadata = header.metadata().iter().flatten();
        let parse = |text: &String| serde_json::from_str(text).expect("metadata are JSON");
        let metadata = metadata.map(|(key, text)| (key.clone(), parse(text))).collect();
        Golden { bytes, metadata }
    }

    /// A value of the metadata: `config`, `versions`, `distance`, `bf16_distance`, `optimizer`.
    pub fn metadata(&self, key: &str) -> &Value {
        self.metadata.get(key).unwrap_or_else(|| panic!("no metadata {key}"))
    }

    /// The model's shape.
    pub fn config(&self) -> Config {
        let config = self.metadata("config");
        let size = |key: &str| config[key].as_u64().unwrap_or_else(|| panic!("no size {key}")) as usize;
        let number = |key: &str| config[key].as_f64().unwrap_or_else(|| panic!("no number {key}"));
        Config {
            vocab: size("vocab_size"),
            width: size("hidden_size"),
            layers: size("num_hidden_layers"),
            heads: size("num_attention_heads"),
            kv_heads: size("num_key_value_heads"),
            ffn: size("intermediate_size"),
            rope_theta: number("rope_theta"),
            norm_epsilon: number("rms_norm_eps"),
        }
    }

    /// How far a tensor of results lies from its f64 value.
    pub fn distance(&self, tensor: &str) -> Distance {
        self.distance_in("distance", tensor)
    }

    /// How far a tensor of PyTorch's bf16 run lies from its f64 value with the same rounded weights.
    pub fn bf16_distance(&self, tensor: &str) -> Distance {
        self.distance_in("bf16_distance", tensor)
    }

    fn distance_in(&self, run: &str, tensor: &str) -> Distance {
        let distance = &self.metadata(run)[tensor];
        let number = |key: &str| distance[key].as_f64().unwrap_or_else(|| panic!("no distance {key} of {tensor}"));
        Distance { max_abs: number("max_abs"), relative: number("relative"), rms: number("rms") }
    }

    /// Names of all tensors, sorted.
    pub fn names(&self) -> Vec<String> {
        let mut names: Vec<String> = self.tensors().names().into_iter().map(str::to_owned).collect();
        names.sort();
        names
    }

    /// A tensor's shape; empty for a single number.
    pub fn shape(&self, tensor: &str) -> Vec<usize> {
        self.tensors().tensor(tensor).unwrap_or_else(|error| panic!("{tensor}: {error}")).shape().to_vec()
    }

    /// A tensor of type f32.
    pub fn f32(&self, tensor: &str) -> Vec<f32> {
        self.elements(tensor, Dtype::F32, f32::from_le_bytes)
    }

    /// A tensor of type f64.
    pub fn f64(&self, tensor: &str) -> Vec<f64> {
        self.elements(tensor, Dtype::F64, f64::from_le_bytes)
    }

    /// A tensor of type i64.
    pub fn i64(&self, tensor: &str) -> Vec<i64> {
        self.elements(tensor, Dtype::I64, i64::from_le_bytes)
    }

    /// A tensor of token ids.
    pub fn tokens(&self, tensor: &str) -> Vec<u32> {
        self.i64(tensor).into_iter().map(|id| u32::try_from(id).expect("a token id fits u32")).collect()
    }

    /// All f32 tensors `<kind>.<parameter>` widened, by parameter: `param`, `grad`, `exp_avg` or `exp_avg_sq`.
    pub fn by_parameter(&self, kind: &str) -> Parameters {
        let parameter = |name: &String| name.strip_prefix(kind)?.strip_prefix('.').map(str::to_owned);
        let widened = |name: &str| self.f32(name).into_iter().map(f64::from).collect();
        self.names().iter().filter_map(|name| Some((parameter(name)?, widened(name)))).collect()
    }

    fn tensors(&self) -> SafeTensors<'_> {
        SafeTensors::deserialize(&self.bytes).expect("a safetensors file")
    }

    fn elements<T, const BYTES: usize>(&self, name: &str, dtype: Dtype, element: fn([u8; BYTES]) -> T) -> Vec<T> {
        let tensors = self.tensors();
        let tensor = tensors.tensor(name).unwrap_or_else(|error| panic!("{name}: {error}"));
        assert_eq!(tensor.dtype(), dtype, "type of {name}");
        let (elements, _) = tensor.data().as_chunks::<BYTES>();
        elements.iter().map(|&bytes| element(bytes)).collect()
    }
}
