//! Memory of a GPU that is mapped by a handle: this process's own, or what another process made.
//! Memory of `cudaIpc` would not do: it cannot be shared in part, and dies with the process that
//! made it.

use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::sync::Arc;

use cudarc::driver::sys::{self, CUdevice, CUdeviceptr, CUmemGenericAllocationHandle};

use super::CudaError;
use super::context::{self, Context};
use super::driver::call;

/// Memory of a GPU, mapped by its handle.
pub(super) struct Mapped {
    context: Arc<Context>,
    pub(super) start: CUdeviceptr,
    /// Its size: whole granules of the driver.
    pub(super) bytes: u64,
    handle: CUmemGenericAllocationHandle,
}

impl Mapped {
    /// Makes and maps `bytes` bytes or a little more: the driver maps whole granules of 2 MiB.
    pub(super) fn make(context: &Arc<Context>, bytes: u64) -> Result<Mapped, CudaError> {
        context.bind()?;
        // SAFETY: a structure of numbers and a null pointer, for which zeros are values.
        let mut kind: sys::CUmemAllocationProp = unsafe { std::mem::zeroed() };
        kind.type_ = sys::CUmemAllocationType::CU_MEM_ALLOCATION_TYPE_PINNED;
        kind.requestedHandleTypes = FILE;
        kind.location = location(context.device);
        let recommended = sys::CUmemAllocationGranularity_flags::CU_MEM_ALLOC_GRANULARITY_RECOMMENDED;
        let access = accesses(context)?;
        let (mut granule, mut handle) = (0, 0);
        // SAFETY: pointers to locals of the types that the driver writes and reads.
        unsafe { call!(cuMemGetAllocationGranularity(&mut granule, &kind, recommended))? };
        let bytes = bytes.max(1).checked_next_multiple_of(granule.max(1) as u64).unwrap_or(u64::MAX);
        // SAFETY: as above.
        unsafe { call!(cuMemCreate(&mut handle, bytes as usize, &kind, 0)) }.map_err(|error| match error {
            CudaError::Call { code, .. } if code == "CUDA_ERROR_OUT_OF_MEMORY" => {
                let (free, total) = context.memory().unwrap_or_default();
                CudaError::Full { ordinal: context.ordinal, bytes, free, total }
            }
            other => other,
        })?;
        Mapped::of(context, handle, bytes, &access)
    }

    /// Maps what another process made, with `bytes` bytes, for `context`'s GPU.
    pub(super) fn import(context: &Arc<Context>, file: BorrowedFd<'_>, bytes: u64) -> Result<Mapped, CudaError> {
        context.bind()?;
        let mut handle = 0;
        let descriptor = std::ptr::without_provenance_mut(file.as_raw_fd() as usize);
        // SAFETY: a pointer to a local, and a descriptor that is open, as the driver takes it.
        unsafe { call!(cuMemImportFromShareableHandle(&mut handle, descriptor, FILE))? };
        Mapped::of(context, handle, bytes, &[access(context.device)])
    }

    /// Maps the whole of what a handle stands for, which is given back with the mapping.
    fn of(
        context: &Arc<Context>,
        handle: CUmemGenericAllocationHandle,
        bytes: u64,
        access: &[sys::CUmemAccessDesc],
    ) -> Result<Mapped, CudaError> {
        let mut start = 0;
        // SAFETY: pointers to locals of the types that the driver writes and reads. Each step that
        // fails undoes those before it, so a handle and a range of addresses are given back once.
        unsafe {
            let mapped = call!(cuMemAddressReserve(&mut start, bytes as usize, 0, 0, 0)).and_then(|()| {
                let mapped = call!(cuMemMap(start, bytes as usize, 0, handle, 0)).and_then(|()| {
                    call!(cuMemSetAccess(start, bytes as usize, access.as_ptr(), access.len())).inspect_err(|_| {
                        let _ = call!(cuMemUnmap(start, bytes as usize));
                    })
                });
                mapped.inspect_err(|_| {
                    let _ = call!(cuMemAddressFree(start, bytes as usize));
                })
            });
            if let Err(error) = mapped {
                let _ = call!(cuMemRelease(handle));
                return Err(error);
            }
        }
        Ok(Mapped { context: context.clone(), start, bytes, handle })
    }

    /// The number of the GPU for which it is mapped.
    pub(super) fn ordinal(&self) -> u32 {
        self.context.ordinal
    }

    /// Whether these bytes are in it.
    pub(super) fn contains(&self, address: CUdeviceptr, bytes: u64) -> bool {
        address >= self.start && bytes <= self.bytes && address - self.start <= self.bytes - bytes
    }

    /// By what another process maps the memory.
    pub(super) fn export(&self) -> Result<OwnedFd, CudaError> {
        self.context.bind()?;
        let mut descriptor = -1;
        // SAFETY: a pointer to a local of the type that this kind of handle has.
        unsafe { call!(cuMemExportToShareableHandle((&raw mut descriptor).cast(), self.handle, FILE, 0))? };
        // SAFETY: the driver has opened it for the caller, who closes it.
        let descriptor = unsafe { OwnedFd::from_raw_fd(descriptor) };
        // Programs that this process starts must not keep the memory.
        // SAFETY: a descriptor that is open.
        unsafe { libc::fcntl(descriptor.as_raw_fd(), libc::F_SETFD, libc::FD_CLOEXEC) };
        Ok(descriptor)
    }
}

impl Drop for Mapped {
    fn drop(&mut self) {
        // Errors have nobody to go to; at the end of the process the driver may be gone.
        if self.context.may_release() {
            // SAFETY: mapped in `Mapped::of`, given back once. No work touches it any more: of a
            // slab, streams and buffers hold the `Inner` that owns it, and a stream waits for its
            // work when it is dropped; of another rank's memory, that is a caller's promise.
            unsafe {
                let _ = call!(cuMemUnmap(self.start, self.bytes as usize));
                let _ = call!(cuMemAddressFree(self.start, self.bytes as usize));
                let _ = call!(cuMemRelease(self.handle));
            }
        }
    }
}

/// Handles are file descriptors.
const FILE: sys::CUmemAllocationHandleType = sys::CUmemAllocationHandleType::CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR;

fn location(device: CUdevice) -> sys::CUmemLocation {
    sys::CUmemLocation { type_: sys::CUmemLocationType::CU_MEM_LOCATION_TYPE_DEVICE, id: device }
}

fn access(device: CUdevice) -> sys::CUmemAccessDesc {
    let flags = sys::CUmemAccess_flags::CU_MEM_ACCESS_FLAGS_PROT_READWRITE;
    sys::CUmemAccessDesc { location: location(device), flags }
}

/// Every GPU of this process that can read and write memory of `context`'s.
fn accesses(context: &Context) -> Result<Vec<sys::CUmemAccessDesc>, CudaError> {
    let mut all = Vec::new();
    for ordinal in 0..context::count()? {
        let (mut device, mut reaches) = (0, 0);
        // SAFETY: pointers to locals, and GPUs that exist.
        unsafe {
            call!(cuDeviceGet(&mut device, ordinal as i32))?;
            if device != context.device {
                call!(cuDeviceCanAccessPeer(&mut reaches, device, context.device))?;
            }
        }
        if device == context.device || reaches != 0 {
            all.push(access(device));
        }
    }
    Ok(all)
}
