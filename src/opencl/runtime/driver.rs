//! All calls into OpenCL, behind functions that are safe to call.
//!
//! Only what OpenCL 1.2 has. Handles are released when dropped; that this fails, as on a lost device, is
//! nothing that anybody could act on, and no reason to panic.

use std::collections::HashMap;
use std::ffi::{CString, c_void};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::{Path, PathBuf};
use std::ptr;
use std::sync::{Mutex, PoisonError};

use opencl3::command_queue as queue;
use opencl3::context::context;
use opencl3::device::{CL_DEVICE_TYPE_ALL, CL_DEVICE_TYPE_CPU, CL_DEVICE_TYPE_GPU, Device};
use opencl3::error_codes::{ClError, DLOPEN_RUNTIME_LOAD_FAILED, error_text};
use opencl3::event::release_event;
use opencl3::memory as cl_memory;
use opencl3::platform::{Platform, get_platforms};
use opencl3::types::{CL_FALSE, CL_TRUE, cl_device_id, cl_event, cl_int};
use opencl3::{kernel as cl_kernel, program as cl_program};

use super::{Argument, Grid, OpenClInfo, quirks};
use crate::error::{Error, Result};

/// The code for a machine on which no driver is installed (`cl_khr_icd`).
const PLATFORM_NOT_FOUND: cl_int = -1001;
const DEVICE_NOT_FOUND: cl_int = -1;
const MEM_OBJECT_ALLOCATION_FAILURE: cl_int = -4;
const OUT_OF_RESOURCES: cl_int = -5;

fn failed(what: impl Into<String>, code: cl_int) -> Error {
    let hint = match code {
        MEM_OBJECT_ALLOCATION_FAILURE | OUT_OF_RESOURCES => {
            ": the device is out of memory or of another resource, or it is lost; use a smaller batch"
        }
        _ => "",
    };
    Error::opencl(what, format!("{} ({code}){hint}", error_text(code)))
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

/// All devices of all platforms.
pub(super) fn list() -> Result<Vec<(Id, OpenClInfo)>> {
    let _alone = quirks::FIRST_QUESTION.lock().unwrap_or_else(PoisonError::into_inner);
    let platforms = get_platforms().map_err(|ClError(code)| match code {
        DLOPEN_RUNTIME_LOAD_FAILED => Error::opencl(
            "devices",
            "this machine has no OpenCL library: install the driver of its GPU, or PoCL (`pocl-opencl-icd`) \
             for its processor",
        ),
        PLATFORM_NOT_FOUND => Error::opencl(
            "devices",
            "no driver is installed for OpenCL: install that of the GPU, or PoCL for the processor",
        ),
        code => failed("devices", code),
    })?;
    let mut found = vec![];
    for platform in platforms {
        let devices = match platform.get_devices(CL_DEVICE_TYPE_ALL) {
            Ok(devices) => devices,
            Err(ClError(DEVICE_NOT_FOUND)) => continue,
            Err(ClError(code)) => return Err(failed("devices", code)),
        };
        for id in devices {
            let info = describe(&platform, id).map_err(|ClError(code)| failed("devices", code))?;
            found.push((Id(id), info));
        }
    }
    Ok(found)
}

fn describe(platform: &Platform, id: cl_device_id) -> opencl3::Result<OpenClInfo> {
    let device = Device::new(id);
    let size = |bytes: u64| usize::try_from(bytes).unwrap_or(usize::MAX);
    let text = |text: String| text.trim_end_matches('\0').trim().to_string();
    Ok(OpenClInfo {
        platform: text(platform.name()?),
        name: text(device.name()?),
        vendor: text(device.vendor()?),
        version: text(device.version()?),
        driver: text(device.driver_version()?),
        kind: match device.dev_type()? {
            kind if kind & CL_DEVICE_TYPE_GPU != 0 => "GPU",
            kind if kind & CL_DEVICE_TYPE_CPU != 0 => "CPU",
            _ => "accelerator",
        },
        memory: size(device.global_mem_size()?),
        largest_buffer: size(device.max_mem_alloc_size()?),
        local_memory: size(device.local_mem_size()?),
        largest_group: device.max_work_group_size()?,
        compute_units: device.max_compute_units()? as usize,
        extensions: text(device.extensions()?).split_whitespace().map(String::from).collect(),
    })
}

/// A device's context and its queue.
pub(super) struct Driver {
    queue: Handle,
    context: Handle,
    device: Handle,
    /// What is being copied to the device: it has to stay until it has arrived.
    in_flight: Mutex<Vec<Vec<u8>>>,
}

/// Memory on the device.
#[derive(Debug)]
pub(super) struct Memory(Handle);

/// Built kernels.
pub(super) struct Program {
    program: Handle,
    kernels: HashMap<&'static str, Handle>,
}

/// Bytes on their way to the device above which the host waits for them.
const MOST_IN_FLIGHT: usize = 64 << 20;

impl Driver {
    pub(super) fn open(Id(device): Id) -> Result<Driver> {
        let keep = |_: *mut c_void| Ok(());
        let context = context::create_context(&[device], ptr::null(), None, ptr::null_mut())
            .map_err(|code| failed("open", code))?;
        let context = Handle { raw: context, release: context::release_context };
        // SAFETY: the device is one of the context's.
        let queue = unsafe { queue::create_command_queue(context.raw, device, 0) };
        let queue = queue.map_err(|code| failed("open", code))?;
        let queue = Handle { raw: queue, release: queue::release_command_queue };
        // A device of a platform, unlike a part of one, is never released.
        Ok(Driver {
            queue,
            context,
            device: Handle { raw: device, release: keep },
            in_flight: Mutex::default(),
        })
    }

    pub(super) fn allocate(&self, bytes: usize) -> Result<Memory> {
        // SAFETY: without a host pointer there is no memory of ours that OpenCL could use.
        let memory = unsafe {
            cl_memory::create_buffer(self.context.raw, cl_memory::CL_MEM_READ_WRITE, bytes, ptr::null_mut())
        };
        let memory = memory.map_err(|code| failed("buffer", code))?;
        Ok(Memory(Handle { raw: memory, release: cl_memory::release_mem_object }))
    }

    /// Queues the copy of all bytes to the start of the memory. Whether the host had to wait for it.
    pub(super) fn write(&self, memory: &Memory, bytes: Vec<u8>) -> Result<bool> {
        if bytes.is_empty() {
            return Ok(false);
        }
        let mut in_flight = self.in_flight.lock().unwrap_or_else(PoisonError::into_inner);
        // SAFETY: `bytes` goes to `in_flight`, which nobody empties before the queue has come past the copy
        // (or, where the queue fails, before the process ends).
        let event = unsafe {
            let (from, len) = (bytes.as_ptr().cast(), bytes.len());
            queue::enqueue_write_buffer(self.queue.raw, memory.0.raw, CL_FALSE, 0, len, from, 0, ptr::null())
        };
        in_flight.push(bytes);
        release(event.map_err(|code| failed("write", code))?);
        let wait = in_flight.iter().map(Vec::len).sum::<usize>() > MOST_IN_FLIGHT;
        drop(in_flight);
        if wait {
            self.finish()?;
        }
        Ok(wait)
    }

    /// Reads from byte `from` of the memory on. All that was queued before is done then.
    pub(super) fn read(&self, memory: &Memory, from: usize, into: &mut [u8]) -> Result<()> {
        let mut in_flight = self.in_flight.lock().unwrap_or_else(PoisonError::into_inner);
        // SAFETY: the call comes back when `into` is filled; OpenCL checks the range in the memory.
        let event = unsafe {
            let (to, len) = (into.as_mut_ptr().cast(), into.len());
            queue::enqueue_read_buffer(self.queue.raw, memory.0.raw, CL_TRUE, from, len, to, 0, ptr::null())
        };
        release(event.map_err(|code| failed("read", code))?);
        in_flight.clear();
        Ok(())
    }

    /// Waits for all that is queued.
    pub(super) fn finish(&self) -> Result<()> {
        let mut in_flight = self.in_flight.lock().unwrap_or_else(PoisonError::into_inner);
        queue::finish(self.queue.raw).map_err(|code| failed("wait", code))?;
        in_flight.clear();
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
                    .map_err(|code| failed(name, code))?;
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
        let of = |text: opencl3::Result<String>| text.map_err(|ClError(code)| failed("cache", code));
        (text, options, of(device.name())?, of(device.driver_version())?).hash(&mut hasher);
        Ok(folder.join(format!("{name}-{:016x}.bin", hasher.finish())))
    }

    /// Writes a built program to a file, whole or not at all.
    fn keep(&self, program: &Handle, path: &Path) -> Result<()> {
        let binaries = cl_program::get_program_info(program.raw, cl_program::CL_PROGRAM_BINARIES);
        let binaries: Vec<Vec<u8>> = binaries.map_err(|code| failed("cache", code))?.into();
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
    ) -> Result<()> {
        let kernel = program.kernel(name)?;
        for (i, arg) in args.iter().enumerate() {
            let (size, value) = match arg {
                Argument::Memory(memory) => (size_of::<*mut c_void>(), ptr::from_ref(&memory.0.raw).cast()),
                Argument::Bytes(bytes) => (bytes.len(), bytes.as_ptr().cast()),
                Argument::Local(bytes) => (*bytes, ptr::null()),
            };
            // SAFETY: `value` points to `size` bytes, which OpenCL copies, or is null for local memory; OpenCL
            // knows the argument's kind and size and refuses another.
            let set = unsafe { cl_kernel::set_kernel_arg(kernel, i as u32, size, value) };
            set.map_err(|code| failed(format!("argument {i} of `{name}`"), code))?;
        }
        let global: [usize; 3] = std::array::from_fn(|i| grid.groups[i] * grid.group[i]);
        let (offset, local) = (ptr::null(), grid.group.as_ptr());
        // SAFETY: the sizes are three each; all arguments are set, or OpenCL refuses. What the kernel itself
        // reads and writes is for its source, which this crate brings along, to keep within its buffers.
        let event = unsafe {
            let queue = self.queue.raw;
            queue::enqueue_nd_range_kernel(queue, kernel, 3, offset, global.as_ptr(), local, 0, ptr::null())
        };
        release(event.map_err(|code| failed(format!("`{name}`"), code))?);
        Ok(())
    }
}

impl Drop for Driver {
    fn drop(&mut self) {
        // What is in flight must not be freed under the device; if it fails, it is leaked.
        if self.finish().is_err() {
            let mut in_flight = self.in_flight.lock().unwrap_or_else(PoisonError::into_inner);
            std::mem::forget(std::mem::take(&mut *in_flight));
        }
    }
}

impl Program {
    fn kernel(&mut self, name: &'static str) -> Result<*mut c_void> {
        if let Some(kernel) = self.kernels.get(name) {
            return Ok(kernel.raw);
        }
        let text = CString::new(name).map_err(|_| Error::opencl(name, "a name with a zero byte"))?;
        let kernel = cl_kernel::create_kernel(self.program.raw, &text)
            .map_err(|code| failed(format!("kernel `{name}`"), code))?;
        self.kernels.insert(name, Handle { raw: kernel, release: cl_kernel::release_kernel });
        Ok(kernel)
    }
}

/// The queue is in order: nobody waits for single events.
fn release(event: cl_event) {
    // SAFETY: the event was just returned to us, and nobody else has it.
    let _ = unsafe { release_event(event) };
}
