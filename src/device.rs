//! Where tensors live, and what belongs to that place: memory kept for reuse, and counters.
//!
//! Nothing here is global: two devices share nothing, and dropping the last tensor and handle of
//! one gives everything back.

mod opencl;

use std::collections::BTreeMap;
use std::fmt::{self, Debug};
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::sync::{Arc, Mutex, PoisonError};

use crate::dtype::{BF16, F16};
use crate::error::{Error, Result};
pub use opencl::ClDevice;

/// Where tensors live and computations run.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub enum Device {
    /// The processor, working in the caller's rayon pool.
    Cpu(Arc<CpuDevice>),
    /// A device that OpenCL knows: a GPU, or the processor by way of a driver for it.
    OpenCl(Arc<ClDevice>),
}

impl Device {
    /// A new CPU device with its own pool of memory.
    ///
    /// ```
    /// let device = randlora::Device::cpu();
    /// assert_eq!(device.memory().live_bytes, 0);
    /// ```
    pub fn cpu() -> Device {
        Device::Cpu(Arc::new(CpuDevice::default()))
    }

    /// The same with layers computed in this precision.
    ///
    /// ```
    /// use randlora::{Device, Precision};
    ///
    /// let device = Device::with_precision(Precision::Bf16);
    /// assert_eq!(device.precision(), Precision::Bf16);
    /// println!("{}", if Precision::Bf16.is_native() { "faster than f32" } else { "computed in f32 here" });
    /// ```
    pub fn with_precision(precision: Precision) -> Device {
        Device::Cpu(Arc::new(CpuDevice { precision, ..CpuDevice::default() }))
    }

    /// The precision that was asked for. What has been computed in it is for
    /// [`Precision::is_native`] to say.
    pub fn precision(&self) -> Precision {
        self.host().precision()
    }

    /// A device that computes layers in bf16 on any processor, slowly, by the instruction's arithmetic.
    #[cfg(test)]
    pub(crate) fn emulating_bf16() -> Device {
        let (precision, emulates) = (Precision::Bf16, true);
        Device::Cpu(Arc::new(CpuDevice { precision, emulates, ..CpuDevice::default() }))
    }

    /// What the device holds now and has held at most.
    pub fn memory(&self) -> Memory {
        match self {
            Device::Cpu(cpu) => Memory {
                live_bytes: cpu.live.load(Relaxed),
                peak_bytes: cpu.peak.load(Relaxed),
                scratch_peak_bytes: cpu.scratch_peak.load(Relaxed),
                kept_bytes: cpu.kept.load(Relaxed),
            },
            Device::OpenCl(cl) => {
                let bytes = cl.runtime.memory();
                Memory {
                    live_bytes: bytes.live,
                    peak_bytes: bytes.peak,
                    scratch_peak_bytes: 0,
                    kept_bytes: bytes.kept,
                }
            }
        }
    }

    /// Starts the peaks of [`Device::memory`] over from what is held now.
    pub fn reset_peaks(&self) {
        match self {
            Device::Cpu(cpu) => {
                cpu.peak.store(cpu.live.load(Relaxed), Relaxed);
                cpu.scratch_peak.store(cpu.scratch.load(Relaxed), Relaxed);
            }
            Device::OpenCl(cl) => cl.runtime.reset_peak(),
        }
    }

    /// Gives memory that is kept for reuse back to the system.
    pub fn trim(&self) {
        self.host().evict(usize::MAX);
        if let Device::OpenCl(cl) = self {
            cl.runtime.trim();
        }
    }

    /// How many graph nodes have been made here so far. Evaluation makes none.
    pub fn nodes_made(&self) -> usize {
        self.nodes().load(Relaxed)
    }

    pub(crate) fn count_node(&self) {
        self.nodes().fetch_add(1, Relaxed);
    }

    fn nodes(&self) -> &AtomicUsize {
        match self {
            Device::Cpu(cpu) => &cpu.nodes,
            Device::OpenCl(cl) => &cl.nodes,
        }
    }

    /// Whether both are one device. All CPU devices are: they differ in what they count, not in place.
    pub(crate) fn is(&self, other: &Device) -> bool {
        match (self, other) {
            (Device::Cpu(_), Device::Cpu(_)) => true,
            (Device::OpenCl(a), Device::OpenCl(b)) => Arc::ptr_eq(a, b),
            _ => false,
        }
    }

    /// The processor's part: of an OpenCL device, what computes the operations that it has no kernel for.
    pub(crate) fn host(&self) -> &Arc<CpuDevice> {
        match self {
            Device::Cpu(cpu) => cpu,
            Device::OpenCl(cl) => &cl.host,
        }
    }

    /// [`Device::host`] as a device: itself for a CPU.
    pub(crate) fn on_host(&self) -> Device {
        Device::Cpu(self.host().clone())
    }
}

impl fmt::Display for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Device::Cpu(_) => f.write_str("the CPU"),
            Device::OpenCl(cl) => write!(f, "OpenCL device `{}`", cl.runtime.info().name),
        }
    }
}

/// What the products of layers are computed in: linear layers forward and backward, with RandLoRA's.
///
/// With bf16 the factors of these products, activations and weights and the gradients of both, are
/// rounded to bf16 (8 bits of mantissa) as they are read, and the sums are f32. All else is what it is
/// without: parameters, gradients and the optimiser's state, attention, norms, losses, and products with
/// fewer than 64 rows or columns. f64 stays f64.
///
/// The same input gives the same bits on any number of threads, on processors and systems of one kind.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Precision {
    /// As the tensors are.
    #[default]
    F32,
    /// Factors in bf16 where the processor has fast instructions for it (AMX on Linux, or AMD's AVX512-BF16),
    /// else as [`Precision::F32`]: [`Precision::is_native`] says which.
    Bf16,
}

impl fmt::Display for Precision {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Precision::F32 => "f32",
            Precision::Bf16 => "bf16",
        })
    }
}

/// A device's use of memory, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Memory {
    /// Held by tensors and by operations that are running.
    pub live_bytes: usize,
    /// The most that was live at one time.
    pub peak_bytes: usize,
    /// The most that operations held for themselves at one time, beyond their results and without what
    /// products pack their factors in.
    pub scratch_peak_bytes: usize,
    /// Free, but kept for the next tensor; gives way to what must be made fresh.
    pub kept_bytes: usize,
}

/// The processor as a device: free buffers kept for reuse, and counters.
///
/// Fresh pages cost a fault each; a training step that reuses the buffers of the step before is
/// spared them.
#[derive(Debug, Default)]
pub struct CpuDevice {
    precision: Precision,
    #[cfg(test)]
    emulates: bool,
    f32: Mutex<Pool<f32>>,
    f64: Mutex<Pool<f64>>,
    u32: Mutex<Pool<u32>>,
    live: AtomicUsize,
    peak: AtomicUsize,
    scratch: AtomicUsize,
    scratch_peak: AtomicUsize,
    kept: AtomicUsize,
    nodes: AtomicUsize,
}

/// Free buffers by capacity.
type Pool<T> = BTreeMap<usize, Vec<Vec<T>>>;

fn lock<T>(pool: &Mutex<Pool<T>>) -> std::sync::MutexGuard<'_, Pool<T>> {
    // A pool is whole between any two of its operations, so a panic elsewhere has not harmed it.
    pool.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What a device's buffers hold, which it keeps for reuse if there is a pool for them.
pub(crate) trait Pooled: Copy + Default + Debug + Send + Sync + 'static {
    fn pool(device: &CpuDevice) -> Option<&Mutex<Pool<Self>>>;
}

impl Pooled for f32 {
    fn pool(device: &CpuDevice) -> Option<&Mutex<Pool<f32>>> {
        Some(&device.f32)
    }
}
impl Pooled for f64 {
    fn pool(device: &CpuDevice) -> Option<&Mutex<Pool<f64>>> {
        Some(&device.f64)
    }
}
/// Packed factors of products.
impl Pooled for u32 {
    fn pool(device: &CpuDevice) -> Option<&Mutex<Pool<u32>>> {
        Some(&device.u32)
    }
}
// Frozen weights and what stands for them are made once and kept: nothing to reuse.
impl Pooled for u16 {
    fn pool(_: &CpuDevice) -> Option<&Mutex<Pool<u16>>> {
        None
    }
}
impl Pooled for BF16 {
    fn pool(_: &CpuDevice) -> Option<&Mutex<Pool<BF16>>> {
        None
    }
}
impl Pooled for F16 {
    fn pool(_: &CpuDevice) -> Option<&Mutex<Pool<F16>>> {
        None
    }
}

/// Below this many elements the allocator is faster than a pool behind a lock.
const POOLED_LEN: usize = 2048;

impl CpuDevice {
    pub(crate) fn precision(&self) -> Precision {
        self.precision
    }

    #[cfg(test)]
    pub(crate) fn emulates_bf16(&self) -> bool {
        self.emulates
    }

    /// A buffer for a tensor, or for a product to pack a factor in: matrixmultiply packs out of sight, so that is not
    /// counted as scratch. What it contains is unspecified: the caller overwrites all of it.
    pub(crate) fn buffer<T: Pooled>(self: &Arc<Self>, len: usize) -> Result<Buffer<T>> {
        self.take(len, false)
    }

    /// A buffer that an operation uses for itself while it runs.
    pub(crate) fn scratch<T: Pooled>(self: &Arc<Self>, len: usize) -> Result<Buffer<T>> {
        self.take(len, true)
    }

    fn take<T: Pooled>(self: &Arc<Self>, len: usize, scratch: bool) -> Result<Buffer<T>> {
        let data = match self.reuse::<T>(len) {
            Some(data) => data,
            None => {
                // Reuse must not make a program larger than it would be without: what is fresh
                // takes the place of what is kept, once both are more than was in use at one time.
                let in_use = self.live.load(Relaxed).saturating_add(len.saturating_mul(size_of::<T>()));
                let most = self.peak.load(Relaxed).max(in_use);
                self.evict(in_use.saturating_add(self.kept.load(Relaxed)).saturating_sub(most));
                fresh(len)?
            }
        };
        Ok(self.adopt(data, scratch))
    }

    /// Lets go of about so many bytes of what is kept, if there are as many.
    fn evict(&self, bytes: usize) {
        let left = bytes.saturating_sub(self.evict_from::<f32>(bytes));
        let left = left.saturating_sub(self.evict_from::<u32>(left));
        self.evict_from::<f64>(left);
    }

    fn evict_from<T: Pooled>(&self, bytes: usize) -> usize {
        let Some(pool) = T::pool(self) else { return 0 };
        let (mut pool, mut freed) = (lock(pool), 0);
        while freed < bytes {
            let Some(mut stack) = pool.first_entry() else { break };
            match stack.get_mut().pop() {
                Some(data) => freed += data.capacity() * size_of::<T>(),
                None => drop(stack.remove()),
            }
        }
        self.kept.fetch_sub(freed, Relaxed);
        freed
    }

    /// Counts a vector as this device's.
    pub(crate) fn adopt<T: Pooled>(self: &Arc<Self>, data: Vec<T>, scratch: bool) -> Buffer<T> {
        let bytes = size_of_val(&data[..]);
        raise(&self.live, &self.peak, bytes);
        if scratch {
            raise(&self.scratch, &self.scratch_peak, bytes);
        }
        Buffer { data, device: self.clone(), scratch }
    }

    fn reuse<T: Pooled>(&self, len: usize) -> Option<Vec<T>> {
        if len < POOLED_LEN {
            return None;
        }
        let mut pool = lock(T::pool(self)?);
        let (&capacity, stack) = pool.range_mut(len..=len + len / 4).next()?;
        let mut data = stack.pop()?;
        if stack.is_empty() {
            pool.remove(&capacity);
        }
        self.kept.fetch_sub(capacity * size_of::<T>(), Relaxed);
        drop(pool);
        data.resize(len, T::default());
        Some(data)
    }

    fn release<T: Pooled>(&self, data: Vec<T>, scratch: bool) {
        let bytes = size_of_val(&data[..]);
        let live = self.live.fetch_sub(bytes, Relaxed) - bytes;
        if scratch {
            self.scratch.fetch_sub(bytes, Relaxed);
        }
        if data.len() < POOLED_LEN {
            return;
        }
        let Some(pool) = T::pool(self) else { return };
        let capacity = data.capacity() * size_of::<T>();
        let mut pool = lock(pool);
        // No more is kept than was in use at one time.
        if self.kept.load(Relaxed) + capacity + live <= self.peak.load(Relaxed) {
            self.kept.fetch_add(capacity, Relaxed);
            pool.entry(data.capacity()).or_default().push(data);
        }
    }
}

fn raise(now: &AtomicUsize, peak: &AtomicUsize, bytes: usize) {
    let total = now.fetch_add(bytes, Relaxed) + bytes;
    peak.fetch_max(total, Relaxed);
}

/// `len` zeros, or an error where the allocator has no memory for them.
pub(crate) fn fresh<T: Pooled>(len: usize) -> Result<Vec<T>> {
    let mut probe = Vec::<T>::new();
    if probe.try_reserve_exact(len).is_err() {
        return Err(Error::OutOfMemory { bytes: len.saturating_mul(size_of::<T>()) });
    }
    // Not filled in place: asked for zeros, the system gives pages that need no clearing.
    drop(probe);
    Ok(vec![T::default(); len])
}

/// A vector that goes back to its device when dropped.
#[derive(Debug)]
pub(crate) struct Buffer<T: Pooled> {
    data: Vec<T>,
    device: Arc<CpuDevice>,
    scratch: bool,
}

impl<T: Pooled> Drop for Buffer<T> {
    fn drop(&mut self) {
        self.device.release(std::mem::take(&mut self.data), self.scratch);
    }
}

impl<T: Pooled> std::ops::Deref for Buffer<T> {
    type Target = [T];
    fn deref(&self) -> &[T] {
        &self.data
    }
}

impl<T: Pooled> std::ops::DerefMut for Buffer<T> {
    fn deref_mut(&mut self) -> &mut [T] {
        &mut self.data
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buffers_are_counted_and_reused() {
        let device = Device::cpu();
        let first = device.host().buffer::<f32>(10_000).unwrap();
        assert_eq!(device.memory().live_bytes, 40_000);
        let place = first.as_ptr();
        drop(first);
        assert_eq!((device.memory().live_bytes, device.memory().kept_bytes), (0, 40_000));
        let second = device.host().buffer::<f32>(9_000).unwrap();
        assert_eq!((second.as_ptr(), second.len()), (place, 9_000));
        assert_eq!(device.memory().kept_bytes, 0);
        drop(second);
        device.trim();
        assert_eq!(device.memory().kept_bytes, 0);
    }

    #[test]
    fn too_much_is_an_error() {
        let device = Device::cpu();
        assert!(matches!(device.host().buffer::<f64>(usize::MAX / 16), Err(Error::OutOfMemory { .. })));
    }
}
