//! What lies between a kernel and the device: memory from a pool, programs built once, one queue.
//!
//! The queue works in order and nobody waits for it but who reads a result: a buffer may go back to the
//! pool while kernels that use it are still queued, because whatever reuses it is queued behind them.
//!
//! `driver` holds all calls into OpenCL and all unsafe code; `absent` stands in for it in builds
//! without the feature `opencl`, which have the same functions and no device.

#[cfg(not(feature = "opencl"))]
#[path = "absent.rs"]
mod driver;
#[cfg(feature = "opencl")]
mod driver;
mod info;
mod pool;
mod quirks;
mod refusal;

use std::collections::HashMap;
use std::fmt;
use std::path::PathBuf;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::error::{Error, Result};
use crate::shape::{Layout, MAX_RANK};
use driver::{Driver, Memory, Program};
use pool::Pool;
use refusal::{Asked, Refusal, with_relief};

pub use info::{OpenClDevices, OpenClInfo};
pub(crate) use pool::PoolBytes;
pub(crate) use quirks::Tile;

/// The kernels of one file.
#[derive(Debug)]
pub(crate) struct Source {
    /// The file's name, for errors.
    pub(crate) name: &'static str,
    pub(crate) text: &'static str,
}

/// What all kernels begin with.
const COMMON: &str = include_str!("../../../kernels/common.cl");

/// An argument of a kernel.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Arg<'a> {
    Buffer(&'a ClBuffer),
    U32(u32),
    U64(u64),
    F32(f32),
    /// A size or place, which kernels count in 32 bits.
    Size(usize),
    /// As the struct `Layout` of common.cl, for a kernel that asks for strides by dimension.
    Layout(&'a Layout),
    /// The same for a kernel that only asks for elements by their place in order: with as few dimensions as
    /// can be.
    Walk(&'a Layout),
    /// A struct of words of 32 bits.
    Words(&'a [u32]),
}

/// How many work-items run: so many groups, in one dimension, of a size in two.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Grid {
    pub(crate) groups: usize,
    #[cfg_attr(not(feature = "opencl"), allow(dead_code))] // Nobody runs any then.
    pub(crate) group: [usize; 2],
}

/// Work-items in a group where nothing else is said. A constant: sums within a group are cut by it.
pub(crate) const GROUP: usize = 64;

/// Kernels count elements, of 2 bytes at least, in 32 bits.
const LARGEST_BUFFER: usize = (u32::MAX as usize).saturating_mul(2);

impl Grid {
    /// At least so many work-items; a kernel leaves alone what is beyond its n.
    pub(crate) fn items(n: usize) -> Grid {
        Grid::groups(n.div_ceil(GROUP))
    }

    /// So many groups of [`GROUP`].
    pub(crate) fn groups(n: usize) -> Grid {
        Grid { groups: n, group: [GROUP, 1] }
    }
}

/// What has been asked of a device so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct OpenClCounts {
    /// Kernels launched.
    pub launches: usize,
    /// Times that the host waited for the device.
    pub waits: usize,
    /// Bytes from the host to the device.
    pub bytes_up: usize,
    /// Bytes from the device to the host.
    pub bytes_down: usize,
}

/// One device, its queue, its memory and its programs.
pub(crate) struct Runtime {
    driver: Driver,
    info: OpenClInfo,
    options: String,
    cache: Option<PathBuf>,
    pool: Mutex<Pool<Memory>>,
    programs: Mutex<HashMap<&'static str, Program>>,
    launches: AtomicUsize,
    waits: AtomicUsize,
    bytes_up: AtomicUsize,
    bytes_down: AtomicUsize,
}

impl fmt::Debug for Runtime {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Runtime({})", self.info.name)
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Both the pool and the programs are whole between any two operations on them.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Devices, and what is wrong with those that do not answer.
type Listed = (Vec<(driver::Id, OpenClInfo)>, Vec<Error>);

/// All devices of all platforms, in the order that the index of [`Runtime::open`] counts.
pub(crate) fn devices() -> Result<OpenClDevices> {
    let (found, broken) = driver::list()?;
    Ok(OpenClDevices { found: found.into_iter().map(|(_, info)| info).collect(), broken })
}

impl Runtime {
    /// Opens device `index`. Built programs are kept in the folder `cache`, if there is one.
    pub(crate) fn open(index: usize, cache: Option<PathBuf>) -> Result<Runtime> {
        Runtime::open_as(index, cache, |_| {})
    }

    /// The same with what the device says of itself changed first.
    #[cfg_attr(not(feature = "opencl"), allow(unreachable_code, unused_variables))] // There is none then.
    pub(crate) fn open_as(
        index: usize,
        cache: Option<PathBuf>,
        change: impl FnOnce(&mut OpenClInfo),
    ) -> Result<Runtime> {
        let (mut found, broken) = driver::list()?;
        if index >= found.len() {
            let broken: String = broken.iter().map(|error| format!("; {error}")).collect();
            let message =
                format!("there is no device {index}: this machine has {} of them{broken}", found.len());
            return Err(Error::opencl("open", message));
        }
        let (id, mut info) = found.swap_remove(index);
        change(&mut info);
        quirks::check(&info)?;
        Ok(Runtime {
            driver: Driver::open(id, quirks::pins(&info))?,
            options: quirks::build_options(&info),
            info,
            cache,
            pool: Mutex::default(),
            programs: Mutex::default(),
            launches: AtomicUsize::new(0),
            waits: AtomicUsize::new(0),
            bytes_up: AtomicUsize::new(0),
            bytes_down: AtomicUsize::new(0),
        })
    }

    pub(crate) fn info(&self) -> &OpenClInfo {
        &self.info
    }

    /// The tiles for products of so many rows, columns and matrices.
    pub(crate) fn tile(&self, sizes: [usize; 3]) -> Tile {
        quirks::tile(&self.info, sizes)
    }

    pub(crate) fn counts(&self) -> OpenClCounts {
        OpenClCounts {
            launches: self.launches.load(Relaxed),
            waits: self.waits.load(Relaxed),
            bytes_up: self.bytes_up.load(Relaxed),
            bytes_down: self.bytes_down.load(Relaxed),
        }
    }

    /// The pool's use of memory.
    pub(crate) fn memory(&self) -> PoolBytes {
        lock(&self.pool).bytes
    }

    pub(crate) fn reset_peak(&self) {
        lock(&self.pool).reset_peak();
    }

    /// Gives what is free in the pool back to the driver.
    pub(crate) fn trim(&self) {
        lock(&self.pool).clear();
    }

    /// A buffer of so many bytes, whose content is unspecified.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`] with the bytes that were asked for.
    pub(crate) fn buffer(self: &Arc<Self>, bytes: usize) -> Result<ClBuffer> {
        let most = LARGEST_BUFFER.min(self.info.largest_buffer);
        let size = match pool::class(bytes) {
            class if class > most && bytes <= most => bytes,
            class => class,
        };
        if size > LARGEST_BUFFER {
            let message =
                format!("{bytes} bytes hold more elements than kernels count: cut the tensor into parts");
            return Err(Error::opencl("buffer", message));
        }
        if size > self.info.largest_buffer {
            return Err(Error::OutOfMemory { bytes });
        }
        let taken = lock(&self.pool).take(size);
        let memory = match taken {
            Some(memory) => memory,
            None => {
                let memory =
                    self.relieved(|| self.driver.allocate(size), |_| Error::OutOfMemory { bytes })?;
                lock(&self.pool).count_fresh(size);
                memory
            }
        };
        Ok(ClBuffer { memory: Some(memory), size, runtime: self.clone() })
    }

    /// Does `act`; where there is no memory for it, what is free in the pool is given up for it first.
    fn relieved<T>(&self, act: impl FnMut() -> Asked<T>, full: impl FnOnce(Refusal) -> Error) -> Result<T> {
        let relieve = || {
            self.trim();
            self.driver.finish()
        };
        with_relief(act, relieve, || self.driver.finish().is_ok(), full)
    }

    /// What is said where the device finds no room for what is in its buffers already.
    fn full(&self, refusal: Refusal) -> Error {
        let live = self.memory().live;
        let message = format!(
            "no memory on the device beside {live} bytes in use: use a smaller batch or a shorter sequence"
        );
        Error::opencl(refusal.what, message)
    }

    /// A buffer that holds these bytes. They are on their way when this returns.
    pub(crate) fn upload(self: &Arc<Self>, bytes: &[u8]) -> Result<ClBuffer> {
        let buffer = self.buffer(bytes.len())?;
        self.bytes_up.fetch_add(bytes.len(), Relaxed);
        let memory = buffer.memory()?;
        if self.relieved(|| self.driver.write(memory, bytes), |refusal| self.full(refusal))? {
            self.waits.fetch_add(1, Relaxed);
        }
        Ok(buffer)
    }

    /// Waits for all that is queued and reads `into.len()` bytes from byte `from` on.
    pub(crate) fn download(&self, buffer: &ClBuffer, from: usize, into: &mut [u8]) -> Result<()> {
        // A view of no elements may begin behind the buffer's end.
        if into.is_empty() {
            return Ok(());
        }
        if from.checked_add(into.len()).is_none_or(|end| end > buffer.size) {
            return Err(Error::opencl("read", format!("{} bytes from {from} on are not there", into.len())));
        }
        self.waits.fetch_add(1, Relaxed);
        self.bytes_down.fetch_add(into.len(), Relaxed);
        // Read twice, it might be what a kernel that failed has left.
        self.driver.read(buffer.memory()?, from, into).map_err(Refusal::into_error)
    }

    /// Waits for all that is queued.
    pub(crate) fn finish(&self) -> Result<()> {
        self.waits.fetch_add(1, Relaxed);
        self.driver.finish().map_err(Refusal::into_error)
    }

    /// Queues a kernel, by the file that it is in and its name. A grid without any group does nothing.
    ///
    /// # Errors
    /// [`Error::OpenCl`] where the file does not build (with the build log), where an argument is wrong, or
    /// where the device refuses (it is lost, or out of memory).
    pub(crate) fn launch(
        &self,
        source: &'static Source,
        kernel: &'static str,
        args: &[Arg<'_>],
        grid: Grid,
    ) -> Result<()> {
        if grid.groups == 0 {
            return Ok(());
        }
        if grid.groups > quirks::MOST_GROUPS {
            let message =
                format!("{} groups are more than devices count: cut the tensor into parts", grid.groups);
            return Err(Error::opencl(kernel, message));
        }
        let args = args.iter().map(|arg| self.argument(kernel, arg)).collect::<Result<Vec<_>>>()?;
        let mut programs = lock(&self.programs);
        let program = match programs.entry(source.name) {
            std::collections::hash_map::Entry::Occupied(entry) => entry.into_mut(),
            std::collections::hash_map::Entry::Vacant(entry) => entry.insert(self.build(source)?),
        };
        self.launches.fetch_add(1, Relaxed);
        self.relieved(|| self.driver.launch(program, kernel, &args, grid), |refusal| self.full(refusal))
    }

    fn build(&self, source: &Source) -> Result<Program> {
        let text = format!("{COMMON}\n{}", source.text);
        self.driver.build(source.name, &text, &self.options, self.cache.as_deref())
    }

    /// The bytes of an argument, or the memory that it stands for.
    fn argument<'a>(&self, kernel: &'static str, arg: &Arg<'a>) -> Result<Argument<'a>> {
        let narrow = |n: usize| {
            let message = || format!("{n} is beyond what kernels count to: cut the tensor into parts");
            u32::try_from(n).map_err(|_| Error::opencl(kernel, message()))
        };
        Ok(match *arg {
            Arg::Buffer(buffer) => Argument::Memory(buffer.memory()?),
            Arg::U32(x) => Argument::Bytes(x.to_ne_bytes().into()),
            Arg::U64(x) => Argument::Bytes(x.to_ne_bytes().into()),
            Arg::F32(x) => Argument::Bytes(x.to_ne_bytes().into()),
            Arg::Size(n) => Argument::Bytes(narrow(n)?.to_ne_bytes().into()),
            Arg::Words(words) => Argument::Bytes(words.iter().flat_map(|word| word.to_ne_bytes()).collect()),
            Arg::Layout(layout) => Argument::Bytes(layout_bytes(layout, narrow)?),
            Arg::Walk(layout) => Argument::Bytes(layout_bytes(&layout.merged(), narrow)?),
        })
    }
}

/// The struct `Layout` of common.cl.
fn layout_bytes(layout: &Layout, narrow: impl Fn(usize) -> Result<u32>) -> Result<Vec<u8>> {
    let mut words = [0u32; 2 + 2 * MAX_RANK];
    words[0] = narrow(layout.shape().rank())?;
    words[1] = narrow(layout.offset())?;
    for (i, (&size, &stride)) in layout.shape().iter().zip(layout.strides()).enumerate() {
        words[2 + i] = narrow(size)?;
        words[2 + MAX_RANK + i] = narrow(stride)?;
    }
    // Places within the layout are sums of products of these.
    narrow(layout.end())?;
    narrow(layout.shape().numel())?;
    Ok(words.iter().flat_map(|word| word.to_ne_bytes()).collect())
}

/// An argument as the driver takes it.
#[cfg_attr(not(feature = "opencl"), allow(dead_code))] // Nobody takes any then.
enum Argument<'a> {
    Memory(&'a Memory),
    Bytes(Vec<u8>),
}

/// Memory on a device, which goes back to its pool when dropped.
pub(crate) struct ClBuffer {
    memory: Option<Memory>,
    size: usize,
    runtime: Arc<Runtime>,
}

impl ClBuffer {
    pub(crate) fn runtime(&self) -> &Arc<Runtime> {
        &self.runtime
    }

    /// The bytes that it has room for.
    pub(crate) fn size(&self) -> usize {
        self.size
    }

    fn memory(&self) -> Result<&Memory> {
        self.memory.as_ref().ok_or_else(|| Error::opencl("buffer", "it was given back"))
    }
}

impl Drop for ClBuffer {
    fn drop(&mut self) {
        if let Some(memory) = self.memory.take() {
            lock(&self.runtime.pool).put(self.size, memory);
        }
    }
}

impl fmt::Debug for ClBuffer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "ClBuffer({} bytes)", self.size)
    }
}
