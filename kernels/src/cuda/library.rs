//! Finds NVIDIA's libraries before cudarc does: cudarc panics where a library or a function is
//! missing, and this crate returns an error that names the remedy.

use std::sync::OnceLock;

use libloading::Library;

use super::CudaError;

/// A library, and which of its functions this crate calls.
pub(super) struct Needed {
    name: &'static str,
    /// How its file is called, without `lib` and what follows the dot.
    stem: &'static str,
    remedy: &'static str,
    symbols: &'static [&'static str],
    /// What the first look found.
    found: OnceLock<Result<(), CudaError>>,
}

pub(super) static DRIVER: Needed = Needed {
    name: "libcuda.so.1",
    stem: "cuda",
    remedy: "install NVIDIA's driver, or run inside a container started with --gpus",
    symbols: super::driver::SYMBOLS,
    found: OnceLock::new(),
};

pub(super) static COMPILER: Needed = Needed {
    name: "libnvrtc.so",
    stem: "nvrtc",
    remedy: "install CUDA 12 or 13 (its NVRTC is enough; the PyPI package nvidia-cuda-nvrtc-cu12 has \
             it) and put its folder on LD_LIBRARY_PATH",
    symbols: super::compile::SYMBOLS,
    found: OnceLock::new(),
};

pub(super) static BLAS: Needed = Needed {
    name: "libcublasLt.so",
    stem: "cublasLt",
    remedy: "install CUDA 12 or 13 (the PyPI package nvidia-cublas-cu12 has it) and put its folder \
             on LD_LIBRARY_PATH",
    symbols: super::blas::SYMBOLS,
    found: OnceLock::new(),
};

impl Needed {
    /// Whether cudarc will find the library and all its functions.
    pub(super) fn check(&self) -> Result<(), CudaError> {
        self.found.get_or_init(|| self.look()).clone()
    }

    fn look(&self) -> Result<(), CudaError> {
        let library = self.open()?;
        let missing = self.symbols.iter().find(|symbol| {
            // SAFETY: the function is looked for, and not called.
            unsafe { library.get::<unsafe extern "C" fn()>(symbol.as_bytes()) }.is_err()
        });
        // It stays loaded: cudarc uses it until the process ends.
        std::mem::forget(library);
        match missing {
            None => Ok(()),
            Some(symbol) => Err(CudaError::NoSymbol { library: self.name, symbol, remedy: self.remedy }),
        }
    }

    /// A function of the library that cudarc does not know by this name.
    ///
    /// # Safety
    /// It has the type `F`, which is a function pointer.
    pub(super) unsafe fn function<F: Copy>(&self, symbol: &'static str) -> Result<F, CudaError> {
        let library = self.open()?;
        // SAFETY: the caller's promise.
        let found = unsafe { library.get::<F>(symbol.as_bytes()) }.map(|function| *function);
        // It stays loaded, as above.
        std::mem::forget(library);
        found.map_err(|_| CudaError::NoSymbol { library: self.name, symbol, remedy: self.remedy })
    }

    fn open(&self) -> Result<Library, CudaError> {
        let mut reason = String::new();
        let library = cudarc::get_lib_name_candidates(self.stem).into_iter().find_map(|file| {
            // SAFETY: loading NVIDIA's libraries runs their constructors, which ask nothing of the
            // caller. Those that cudarc loads later are the same, by the same names.
            match unsafe { Library::new(&file) } {
                Ok(library) => Some(library),
                Err(error) => {
                    // The last name is the one that is there where a library is installed.
                    reason = std::error::Error::source(&error).map_or(error.to_string(), ToString::to_string);
                    None
                }
            }
        });
        library.ok_or(CudaError::NoLibrary { library: self.name, reason, remedy: self.remedy })
    }
}
