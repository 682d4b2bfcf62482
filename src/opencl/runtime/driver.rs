//! All calls into OpenCL, behind functions that are safe to call.
//!
//! Only what OpenCL 1.2 has. Handles are released when dropped; that this fails, as on a lost device, is
//! nothing that anybody could act on, and no reason to panic.

mod list;
mod staging;

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::ffi::{CString, c_void};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::{Path, PathBuf};
use std::ptr;
use std::sync::{Mutex, MutexGuard, PoisonError};

use opencl3::command_queue as queue;
use opencl3::context::context;
use opencl3::device::Device;
use opencl3::error_codes::{ClError, error_text};
use opencl3::event::release_event;
use opencl3::memory as cl_memory;
use opencl3::types::{CL_FALSE, CL_TRUE, cl_device_id, cl_event, cl_int};
use opencl3::{kernel as cl_kernel, program as cl_program};

use super::refusal::{Asked, Refusal};
use super::{Argument, Grid};
use crate::error::{Error, Result};
pub(super) use list::list;
use staging::{PIECE, Pinned};

/// CL_OUT_OF_HOST_MEMORY.
const NO_HOST_MEMORY: cl_int = -6;
const INVALID_KERNEL_NAME: cl_int = -46;
const INVALID_KERNEL_ARGS: cl_int = -52;

fn refused(what: impl Into<String>, code: cl_int) -> Refusal {
    Refusal { what: what.into(), code, name: error_text(code) }
}

/// An OpenCL object that is released with the value.
#[derive(Debug)]
struct Handle {
    raw: *mut c_void,
    release: unsafe fn(*mut c_void) -> std::result::Result<(), cl_int>,
}

impl Drop for Handle {
    fn drop(&mut self) {
        // SAFETY: `raw` is an object of the kind that `release` is for (every `Handle` is made beside the
        // call that makes the object), and it is released once.
        let _ = unsafe { (self.release)(self.raw) };
    }
}

// SAFETY: OpenCL objects may be used from any thread, several at a time (OpenCL 1.2, A.2). The exception,
// setting the arguments of a kernel, takes `&mut Program`.
unsafe impl Send for Handle {}
// SAFETY: as above.
unsafe impl Sync for Handle {}

/// A device that was listed.
pub(super) struct Id(cl_device_id);

/// A device's context and its queue.
pub(super) struct Driver {
    // Dropped in this order: what is pinned before the queue that mapped it.
    transfers: Mutex<Transfers>,
    queue: Handle,
    context: Handle,
    device: Handle,
    /// Whether copies go through pinned memory.
    pins: bool,
}

/// What host memory the device may be copying from.
#[derive(Default)]
struct Transfers {
    /// It has to stay until it has arrived.
    in_flight: Vec<Vec<u8>>,
    pinned_in_flight: Vec<Pinned>,
    pinned: Vec<Pinned>,
}

impl Transfers {
    /// The queue has come past all copies.
    fn arrived(&mut self) {
        self.in_flight.clear();
        self.pinned.append(&mut self.pinned_in_flight);
    }

    fn bytes(&self) -> usize {
        self.in_flight.iter().map(Vec::len).sum::<usize>() + PIECE * self.pinned_in_flight.len()
    }
}

/// Memory on the device.
#[derive(Debug)]
pub(super) struct Memory(Handle);

/// Built kernels.
pub(super) struct Program {
    program: Handle,
    kernels: HashMap<&'static str, Kernel>,
}

struct Kernel {
    handle: Handle,
    /// How many arguments it has.
    arguments: usize,
}

/// Bytes on their way to the device above which the host waits for them.
const MOST_IN_FLIGHT: usize = 64 << 20;

impl Driver {
    pub(super) fn open(Id(device): Id, pins: bool) -> Result<Driver> {
        let keep = |_: *mut c_void| Ok(());
        let context = context::create_context(&[device], ptr::null(), None, ptr::null_mut())
            .map_err(|code| refused("open", code).into_error())?;
        let context = Handle { raw: context, release: context::release_context };
        // SAFETY: the device is one of the context's.
        let queue = unsafe { queue::create_command_queue(context.raw, device, 0) };
        let queue = queue.map_err(|code| refused("open", code).into_error())?;
        let queue = Handle { raw: queue, release: queue::release_command_queue };
        // A device of a platform, unlike a part of one, is never released.
        let device = Handle { raw: device, release: keep };
        Ok(Driver { transfers: Mutex::default(), queue, context, device, pins })
    }

    fn transfers(&self) -> MutexGuard<'_, Transfers> {
        self.transfers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn allocate(&self, bytes: usize) -> Asked<Memory> {
        // SAFETY: without a host pointer there is no memory of ours that OpenCL could use.
        let memory = unsafe {
            cl_memory::create_buffer(self.context.raw, cl_memory::CL_MEM_READ_WRITE, bytes, ptr::null_mut())
        };
        let memory = memory.map_err(|code| refused("buffer", code))?;
        Ok(Memory(Handle { raw: memory, release: cl_memory::release_mem_object }))
    }

    /// Queues the copy of all bytes to the start of the memory. Whether the host had to wait for it.
    pub(super) fn write(&self, memory: &Memory, bytes: &[u8]) -> Asked<bool> {
        let mut transfers = self.transfers();
        let mut waited = false;
        for (from, part) in (0..).step_by(PIECE).zip(bytes.chunks(PIECE)) {
            if transfers.bytes() + part.len() > MOST_IN_FLIGHT {
                self.wait(&mut transfers)?;
                waited = true;
            }
            if self.pins {
                let mut piece = transfers.pinned.pop().map_or_else(|| self.pin(), Ok)?;
                piece.bytes()[..part.len()].copy_from_slice(part);
                let queued = self.queue_write(memory, from, &piece.bytes()[..part.len()]);
                transfers.pinned_in_flight.push(piece);
                queued?;
            } else {
                let part = part.to_vec();
                let queued = self.queue_write(memory, from, &part);
                transfers.in_flight.push(part);
                queued?;
            }
        }
        Ok(waited)
    }

    fn pin(&self) -> Asked<Pinned> {
        Pinned::new(&self.context, &self.queue)
    }

    /// Queues a copy. The caller keeps the bytes where they are in `transfers`.
    fn queue_write(&self, memory: &Memory, at: usize, bytes: &[u8]) -> Asked<()> {
        let (from, len) = (bytes.as_ptr().cast(), bytes.len());
        // SAFETY: whatever comes of it, the bytes go to `transfers`, which nobody empties before the queue has
        // come past the copy (or, where the queue fails, before the process ends).
        let event = unsafe {
            queue::enqueue_write_buffer(self.queue.raw, memory.0.raw, CL_FALSE, at, len, from, 0, ptr::null())
        };
        release(event.map_err(|code| refused("write", code))?);
        Ok(())
    }

    /// Reads from byte `from` of the memory on. All that was queued before is done then.
    pub(super) fn read(&self, memory: &Memory, from: usize, into: &mut [u8]) -> Asked<()> {
        let mut transfers = self.transfers();
        if !self.pins {
            self.read_into(memory, from, into)?;
            transfers.arrived();
            return Ok(());
        }
        let mut piece = transfers.pinned.pop().map_or_else(|| self.pin(), Ok)?;
        for (at, part) in (from..).step_by(PIECE).zip(into.chunks_mut(PIECE)) {
            let pinned = &mut piece.bytes()[..part.len()];
            self.read_into(memory, at, pinned)?;
            part.copy_from_slice(pinned);
        }
        transfers.pinned.push(piece);
        transfers.arrived();
        Ok(())
    }

    fn read_into(&self, memory: &Memory, from: usize, into: &mut [u8]) -> Asked<()> {
        // SAFETY: the call comes back when `into` is filled; OpenCL checks the range in the memory.
        let event = unsafe {
            let (to, len) = (into.as_mut_ptr().cast(), into.len());
            queue::enqueue_read_buffer(self.queue.raw, memory.0.raw, CL_TRUE, from, len, to, 0, ptr::null())
        };
        release(event.map_err(|code| refused("read", code))?);
        Ok(())
    }

    /// Waits for all that is queued.
    pub(super) fn finish(&self) -> Asked<()> {
        self.wait(&mut self.transfers())
    }

    fn wait(&self, transfers: &mut Transfers) -> Asked<()> {
        queue::finish(self.queue.raw).map_err(|code| refused("wait", code))?;
        transfers.arrived();
        Ok(())
    }

    /// Builds a program, or finds it in the folder `cache`.
    pub(super) fn build(
        &self,
        name: &'static str,
        text: &str,
        options: &str,
        cache: Option<&Path>,
    ) -> Result<Program> {
        let kept = cache.map(|folder| self.kept_at(folder, name, text, options)).transpose()?;
        let options = CString::new(options).map_err(|_| Error::opencl(name, "options with a zero byte"))?;
        let kept_bytes = kept.as_ref().and_then(|path| std::fs::read(path).ok());
        // What is kept may be damaged or of another driver: then it is built again.
        let from_kept = kept_bytes.and_then(|bytes| {
            // SAFETY: the bytes outlive the call; what is in them the driver checks.
            let program = unsafe {
                cl_program::create_program_with_binary(self.context.raw, &[self.device.raw], &[&bytes])
            };
            self.built(Handle { raw: program.ok()?, release: cl_program::release_program }, &options).ok()
        });
        let program = match from_kept {
            Some(program) => program,
            None => {
                let program = cl_program::create_program_with_source(self.context.raw, &[text])
                    .map_err(|code| refused(name, code).into_error())?;
                let program = Handle { raw: program, release: cl_program::release_program };
                let program = self.built(program, &options).map_err(|(code, log)| {
                    Error::opencl(name, format!("does not build: {} ({code})\n{log}", error_text(code)))
                })?;
                if let Some(path) = &kept {
                    // It has been built: that it is not kept for the next time is no reason to stop.
                    let _ = self.keep(&program, path);
                }
                program
            }
        };
        Ok(Program { program, kernels: HashMap::new() })
    }

    /// The program, or the code and the build log.
    fn built(&self, program: Handle, options: &CString) -> std::result::Result<Handle, (cl_int, String)> {
        let built =
            cl_program::build_program(program.raw, &[self.device.raw], options, None, ptr::null_mut());
        built.map_err(|code| {
            let log = cl_program::CL_PROGRAM_BUILD_LOG;
            let log = cl_program::get_program_build_data(program.raw, self.device.raw, log);
            (code, String::from_utf8_lossy(&log.unwrap_or_default()).trim_end_matches('\0').to_string())
        })?;
        Ok(program)
    }

    /// The file of a built program: of these sources and options for this device and driver.
    fn kept_at(&self, folder: &Path, name: &str, text: &str, options: &str) -> Result<PathBuf> {
        let device = Device::new(self.device.raw);
        let mut hasher = DefaultHasher::new();
        let of =
            |text: opencl3::Result<String>| text.map_err(|ClError(code)| refused("cache", code).into_error());
        (text, options, of(device.name())?, of(device.driver_version())?).hash(&mut hasher);
        Ok(folder.join(format!("{name}-{:016x}.bin", hasher.finish())))
    }

    /// Writes a built program to a file, whole or not at all.
    fn keep(&self, program: &Handle, path: &Path) -> Result<()> {
        let binaries = cl_program::get_program_info(program.raw, cl_program::CL_PROGRAM_BINARIES);
        let binaries: Vec<Vec<u8>> = binaries.map_err(|code| refused("cache", code).into_error())?.into();
        let Some(binary) = binaries.into_iter().next().filter(|binary| !binary.is_empty()) else {
            return Ok(());
        };
        let io = |source| Error::Io { path: path.into(), source };
        // Other processes may be writing the same file.
        let part = path.with_extension(format!("{}.part", crate::system::process()));
        if let Some(folder) = path.parent() {
            std::fs::create_dir_all(folder).map_err(io)?;
        }
        let done = std::fs::write(&part, binary).and_then(|()| std::fs::rename(&part, path));
        done.map_err(|source| {
            let _ = std::fs::remove_file(&part);
            io(source)
        })
    }

    /// Queues a kernel.
    pub(super) fn launch(
        &self,
        program: &mut Program,
        name: &'static str,
        args: &[Argument<'_>],
        grid: Grid,
    ) -> Asked<()> {
        let kernel = program.kernel(name)?;
        // What is left out would keep its value of the last time.
        if args.len() != kernel.arguments {
            let what = format!("`{name}` has {} arguments and got {}", kernel.arguments, args.len());
            return Err(refused(what, INVALID_KERNEL_ARGS));
        }
        let kernel = kernel.handle.raw;
        for (i, arg) in args.iter().enumerate() {
            let (size, value) = match arg {
                Argument::Memory(memory) => (size_of::<*mut c_void>(), ptr::from_ref(&memory.0.raw).cast()),
                Argument::Bytes(bytes) => (bytes.len(), bytes.as_ptr().cast()),
            };
            // SAFETY: `value` points to `size` bytes, which OpenCL copies; OpenCL knows the argument's kind and size and refuses another.
            let set = unsafe { cl_kernel::set_kernel_arg(kernel, i as u32, size, value) };
            set.map_err(|code| refused(format!("argument {i} of `{name}`"), code))?;
        }
        let global = [grid.groups * grid.group[0], grid.group[1]];
        let (offset, local) = (ptr::null(), grid.group.as_ptr());
        // SAFETY: the sizes are two each; all arguments are set. What the kernel itself reads and writes is for
        // its source, which this crate brings along, to keep within its buffers.
        let event = unsafe {
            let queue = self.queue.raw;
            queue::enqueue_nd_range_kernel(queue, kernel, 2, offset, global.as_ptr(), local, 0, ptr::null())
        };
        release(event.map_err(|code| refused(format!("`{name}`"), code))?);
        Ok(())
    }
}

impl Drop for Driver {
    fn drop(&mut self) {
        // What is in flight must not be freed under the device; if it fails, it is leaked.
        if self.finish().is_err() {
            std::mem::forget(std::mem::take(&mut *self.transfers()));
        }
    }
}

impl Program {
    fn kernel(&mut self, name: &'static str) -> Asked<&Kernel> {
        Ok(match self.kernels.entry(name) {
            Entry::Occupied(entry) => entry.into_mut(),
            Entry::Vacant(entry) => entry.insert(Kernel::of(&self.program, name)?),
        })
    }
}

impl Kernel {
    fn of(program: &Handle, name: &'static str) -> Asked<Kernel> {
        let failed = |code| refused(format!("kernel `{name}`"), code);
        let text = CString::new(name).map_err(|_| failed(INVALID_KERNEL_NAME))?;
        let raw = cl_kernel::create_kernel(program.raw, &text).map_err(failed)?;
        let handle = Handle { raw, release: cl_kernel::release_kernel };
        let arguments = cl_kernel::get_kernel_info(raw, cl_kernel::CL_KERNEL_NUM_ARGS).map_err(failed)?;
        Ok(Kernel { handle, arguments: arguments.to_uint() as usize })
    }
}

/// The queue is in order: nobody waits for single events.
fn release(event: cl_event) {
    // SAFETY: the event was just returned to us, and nobody else has it.
    let _ = unsafe { release_event(event) };
}
