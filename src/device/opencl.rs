//! OpenCL devices: opening them, and counting what they have no kernels for.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::{CpuDevice, Device};
use crate::error::{Error, Result};
use crate::opencl::runtime::{self, OpenClCounts, OpenClDevices, OpenClInfo, Runtime};

/// An OpenCL device, and a CPU device for what it has no kernels for.
#[derive(Debug)]
pub struct ClDevice {
    pub(super) runtime: Arc<Runtime>,
    pub(super) host: Arc<CpuDevice>,
    pub(super) nodes: AtomicUsize,
    strict: AtomicBool,
    round_trips: Mutex<BTreeMap<&'static str, usize>>,
}

impl ClDevice {
    /// What the device says of itself.
    pub fn info(&self) -> &OpenClInfo {
        self.runtime.info()
    }

    fn trips(&self) -> MutexGuard<'_, BTreeMap<&'static str, usize>> {
        // Counters are whole whoever panicked.
        self.round_trips.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Device {
    /// OpenCL device `index`, counted as in [`Device::opencl_devices`].
    ///
    /// Tensors come to it and back by [`Tensor::to_device`](crate::Tensor::to_device). It computes in
    /// f32; an operation without a kernel for its inputs goes through the host, see
    /// [`Device::round_trips`]. Kernels are built when they are first used.
    ///
    /// # Errors
    /// [`Error::OpenCl`] where there is no such device, no driver, or no OpenCL in this build (feature
    /// `opencl`), and where the device lacks what the kernels need.
    pub fn opencl(index: usize) -> Result<Device> {
        Device::open(index, None)
    }

    /// The same with the built kernels kept in a folder, which spares the next process building them.
    ///
    /// Nothing else writes to the disk; some drivers keep a folder of their own.
    pub fn opencl_cached(index: usize, folder: impl Into<PathBuf>) -> Result<Device> {
        Device::open(index, Some(folder.into()))
    }

    fn open(index: usize, cache: Option<PathBuf>) -> Result<Device> {
        Ok(Device::OpenCl(Arc::new(ClDevice {
            runtime: Arc::new(Runtime::open(index, cache)?),
            host: Arc::default(),
            nodes: AtomicUsize::new(0),
            strict: AtomicBool::new(false),
            round_trips: Mutex::default(),
        })))
    }

    /// What OpenCL devices this machine has, and what is wrong with those that do not answer.
    ///
    /// # Errors
    /// [`Error::OpenCl`] where there is no driver or none that answers, or no OpenCL in this build.
    pub fn opencl_devices() -> Result<OpenClDevices> {
        runtime::devices()
    }

    /// How often operations without a kernel went through the host, by their names: the log of what is
    /// slow on an OpenCL device. Empty on the CPU.
    pub fn round_trips(&self) -> BTreeMap<&'static str, usize> {
        match self {
            Device::Cpu(_) => BTreeMap::new(),
            Device::OpenCl(cl) => cl.trips().clone(),
        }
    }

    /// Whether an operation without a kernel is an error from now on, instead of a way through the host.
    /// Nothing changes on the CPU.
    pub fn set_strict(&self, strict: bool) {
        if let Device::OpenCl(cl) = self {
            cl.strict.store(strict, Relaxed);
        }
    }

    /// Waits until an OpenCL device has done all that it was asked for, as a clock needs it; on the CPU all is done.
    ///
    /// # Errors
    /// [`Error::OpenCl`] where the device has failed.
    pub fn synchronize(&self) -> Result<()> {
        self.runtime().map_or(Ok(()), |runtime| runtime.finish())
    }

    /// What has been asked of an OpenCL device so far; all 0 on the CPU.
    pub fn opencl_counts(&self) -> OpenClCounts {
        match self {
            Device::Cpu(_) => OpenClCounts::default(),
            Device::OpenCl(cl) => cl.runtime.counts(),
        }
    }

    /// The OpenCL device; None for a CPU.
    pub(crate) fn runtime(&self) -> Option<&Arc<Runtime>> {
        match self {
            Device::Cpu(_) => None,
            Device::OpenCl(cl) => Some(&cl.runtime),
        }
    }

    /// Counts a way through the host that operation `op` takes.
    ///
    /// # Errors
    /// [`Error::OpenCl`] where [`Device::set_strict`] forbids it.
    pub(crate) fn count_round_trip(&self, op: &'static str) -> Result<()> {
        let Device::OpenCl(cl) = self else { return Ok(()) };
        if cl.strict.load(Relaxed) {
            let message = "no kernel for these inputs, and the device is strict: move them to the CPU with \
                           `to_device`, or allow the way through the host with `set_strict(false)`";
            return Err(Error::opencl(op, message));
        }
        *cl.trips().entry(op).or_insert(0) += 1;
        Ok(())
    }
}
