//! Compiles the kernels of `kernels/cuda` for the GPU at hand, at first use, and keeps the result.

use std::collections::HashMap;
use std::ffi::{CStr, CString, c_char};
use std::path::{Path, PathBuf};

use cudarc::driver::sys::{CUfunction, CUfunction_attribute, CUmodule};
use cudarc::nvrtc::sys::{self, nvrtcResult};
use xxhash_rust::xxh3::xxh3_128;

use super::CudaError;
use super::attention::SHARED;
use super::driver::call;

/// Every function of NVRTC that is called.
pub(super) const SYMBOLS: &[&str] = &[
    "nvrtcCompileProgram",
    "nvrtcCreateProgram",
    "nvrtcDestroyProgram",
    "nvrtcGetCUBIN",
    "nvrtcGetCUBINSize",
    "nvrtcGetErrorString",
    "nvrtcGetProgramLog",
    "nvrtcGetProgramLogSize",
    "nvrtcVersion",
];

macro_rules! sources {
    ($($file:literal),* $(,)?) => {
        [$(($file, include_str!(concat!("../../cuda/", $file)))),*]
    };
}

/// The program, file by file.
const SOURCES: [(&str, &str); 14] = sources!(
    "common.cuh",
    "tensor.cuh",
    "adamw.cu",
    "attention.cu",
    "cross_entropy.cu",
    "elementwise.cu",
    "embedding.cu",
    "flash_attention.cu",
    "latch.cu",
    "reduce.cu",
    "rms_norm.cu",
    "rope.cu",
    "square_norm.cu",
    "swiglu.cu",
);

/// Without fused multiply-adds that the source does not name, so that a kernel computes what the
/// same source computes on a processor.
const OPTIONS: [&str; 2] = ["--std=c++17", "--fmad=false"];

/// Every kernel that is launched.
pub(super) const KERNELS: &[&str] = &[
    "accumulate",
    "adamw_bf16_bf16",
    "adamw_bf16_f32",
    "adamw_f32_bf16",
    "adamw_f32_f32",
    "adamw_none_bf16",
    "adamw_none_f32",
    "attention_gradient_bf16",
    "attention_gradient_f32",
    "attention_output_bf16",
    "attention_output_f32",
    "attention_projection_bf16",
    "attention_projection_f32",
    "attention_softmax_bf16",
    "attention_softmax_f32",
    "cast_bf16_f32",
    "cast_f32_bf16",
    "copy",
    "cross_entropy_bf16",
    "cross_entropy_f32",
    "embedding_backward",
    "embedding_bf16",
    "embedding_f32",
    "flash_attention_128",
    "flash_attention_64",
    "flash_attention_keys_128",
    "flash_attention_keys_64",
    "flash_attention_queries_128",
    "flash_attention_queries_64",
    "follow_event",
    "follow_latch",
    "follow_marks",
    "follow_riders",
    "reduce_bf16_bf16",
    "reduce_bf16_f32",
    "reduce_f32_bf16",
    "reduce_f32_f32",
    "rms_norm_backward_bf16",
    "rms_norm_backward_f32",
    "rms_norm_bf16_bf16",
    "rms_norm_bf16_f32",
    "rms_norm_f32_bf16",
    "rms_norm_f32_f32",
    "rope_bf16",
    "rope_f32",
    "square_norm_parts_bf16",
    "square_norm_parts_f32",
    "square_norm_total",
    "sum_losses",
    "sum_numbers",
    "sum_rows",
    "swiglu_backward_bf16",
    "swiglu_backward_f32",
    "swiglu_bf16",
    "swiglu_f32",
    "write_rider",
    "zero",
];

/// The kernels, loaded.
pub(super) struct Functions {
    by_name: HashMap<&'static str, CUfunction>,
}

impl Functions {
    /// Compiles the kernels for an architecture, or takes what an earlier process has compiled,
    /// and loads them all into the context that is current. Loading one later would wait for
    /// everything that the GPU does.
    pub(super) fn load(architecture: &str) -> Result<Functions, CudaError> {
        let image = image(architecture)?;
        let mut module: CUmodule = std::ptr::null_mut();
        // SAFETY: the image is a whole cubin, as NVRTC gave it; the driver copies it.
        unsafe { call!(cuModuleLoadData(&mut module, image.as_ptr().cast()))? };
        let mut by_name = HashMap::with_capacity(KERNELS.len());
        for &name in KERNELS {
            let (text, mut function) = (CString::new(name).expect("a name has no zero"), std::ptr::null_mut());
            // SAFETY: the module is loaded and stays so; the name ends with a zero.
            unsafe { call!(cuModuleGetFunction(&mut function, module, text.as_ptr()))? };
            by_name.insert(name, function);
        }
        for (name, bytes) in SHARED {
            // More than 48 KiB must be asked for.
            let most = CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
            // SAFETY: a function that is loaded.
            unsafe { call!(cuFuncSetAttribute(by_name[name], most, bytes as i32))? };
        }
        Ok(Functions { by_name })
    }

    /// The kernel of this name.
    ///
    /// # Panics
    /// For a name that is not in [`KERNELS`].
    pub(super) fn get(&self, name: &str) -> CUfunction {
        self.by_name.get(name).copied().unwrap_or_else(|| panic!("KERNELS does not list {name}"))
    }
}

/// The whole program. Lines keep the numbers that they have in their files.
fn source() -> String {
    SOURCES.iter().map(|(file, text)| format!("#line 1 \"{file}\"\n{text}\n")).collect()
}

fn image(architecture: &str) -> Result<Vec<u8>, CudaError> {
    let source = source();
    let kept = cache().map(|folder| {
        let what = format!("{source}{OPTIONS:?}");
        folder.join(format!("{:032x}-{architecture}-{}.cubin", xxh3_128(what.as_bytes()), version()))
    });
    if let Some(image) = kept.as_deref().and_then(read) {
        return Ok(image);
    }
    let image = compile(&source, architecture)?;
    if let Some(path) = kept {
        // Where it cannot be kept, the next process compiles again.
        let _ = keep(&path, &image);
    }
    Ok(image)
}

/// Where compiled kernels are kept: PILLION_CUDA_CACHE, or a folder of the user's cache.
fn cache() -> Option<PathBuf> {
    let folder = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    folder("PILLION_CUDA_CACHE").or_else(|| {
        let caches = folder("XDG_CACHE_HOME").or_else(|| Some(folder("HOME")?.join(".cache")))?;
        Some(caches.join("pillion/cuda"))
    })
}

/// What is kept at `path`: an image followed by its digest, so that a part of one is none.
fn read(path: &Path) -> Option<Vec<u8>> {
    let mut image = std::fs::read(path).ok()?;
    let digest = image.split_off(image.len().checked_sub(16)?);
    (xxh3_128(&image).to_le_bytes()[..] == digest).then_some(image)
}

fn keep(path: &Path, image: &[u8]) -> std::io::Result<()> {
    let folder = path.parent().expect("the path is a file in a folder");
    std::fs::create_dir_all(folder)?;
    // Another process may keep the same: each writes a file of its own and renames it.
    let draft = path.with_extension(format!("{}.draft", std::process::id()));
    let digest = xxh3_128(image).to_le_bytes();
    std::fs::write(&draft, [image, &digest[..]].concat()).and_then(|()| std::fs::rename(&draft, path)).inspect_err(
        |_| {
            let _ = std::fs::remove_file(&draft);
        },
    )
}

/// The compiler's version.
fn version() -> String {
    let (mut major, mut minor) = (0, 0);
    // SAFETY: pointers to locals.
    let _ = unsafe { sys::nvrtcVersion(&mut major, &mut minor) };
    format!("{major}.{minor}")
}

/// Compiles `source` to an image for `architecture`, such as `sm_90`.
fn compile(source: &str, architecture: &str) -> Result<Vec<u8>, CudaError> {
    let source = CString::new(source).expect("sources have no zeros");
    let target = format!("--gpu-architecture={architecture}");
    let options: Vec<CString> =
        [target.as_str()].iter().chain(&OPTIONS).map(|option| CString::new(*option).expect("no zeros")).collect();
    let options: Vec<*const c_char> = options.iter().map(|option| option.as_ptr()).collect();
    let mut program = std::ptr::null_mut();
    // SAFETY: texts end with a zero and live until the end of this function; there are no headers;
    // buffers have the sizes that NVRTC asks for; the program is destroyed once.
    unsafe {
        let created = sys::nvrtcCreateProgram(
            &mut program,
            source.as_ptr(),
            c"pillion.cu".as_ptr(),
            0,
            std::ptr::null(),
            std::ptr::null(),
        );
        check("nvrtcCreateProgram", created)?;
        let compiled = sys::nvrtcCompileProgram(program, options.len() as i32, options.as_ptr());
        let result = if compiled == nvrtcResult::NVRTC_SUCCESS {
            let mut bytes = 0;
            check("nvrtcGetCUBINSize", sys::nvrtcGetCUBINSize(program, &mut bytes)).and_then(|()| {
                let mut image = vec![0u8; bytes];
                check("nvrtcGetCUBIN", sys::nvrtcGetCUBIN(program, image.as_mut_ptr().cast()))?;
                Ok(image)
            })
        } else {
            let mut bytes = 0;
            let _ = sys::nvrtcGetProgramLogSize(program, &mut bytes);
            let mut log = vec![0u8; bytes + 1];
            let _ = sys::nvrtcGetProgramLog(program, log.as_mut_ptr().cast());
            let log = CStr::from_bytes_until_nul(&log).map(|log| log.to_string_lossy().trim().to_owned());
            Err(CudaError::Compile { architecture: architecture.to_owned(), log: log.unwrap_or_default() })
        };
        let _ = sys::nvrtcDestroyProgram(&mut program);
        result
    }
}

fn check(call: &'static str, result: nvrtcResult) -> Result<(), CudaError> {
    if result == nvrtcResult::NVRTC_SUCCESS {
        return Ok(());
    }
    // SAFETY: the text is a constant of the library.
    let text = unsafe { CStr::from_ptr(sys::nvrtcGetErrorString(result)) };
    Err(CudaError::Call { call, code: text.to_string_lossy().into_owned(), text: String::new() })
}
