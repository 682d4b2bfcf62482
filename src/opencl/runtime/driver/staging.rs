//! Host memory that a device copies from and to by itself, without a copy by the driver in between.

use std::ptr::{self, NonNull};

use opencl3::command_queue as queue;
use opencl3::memory as cl_memory;
use opencl3::types::CL_TRUE;

use super::{Handle, refused, release};
use crate::opencl::runtime::refusal::Asked;

/// The bytes of a piece; what is larger is copied piece by piece.
pub(super) const PIECE: usize = 4 << 20;

/// A piece of pinned memory: a buffer of the driver's that stays mapped for as long as it lives.
pub(super) struct Pinned {
    bytes: NonNull<u8>,
    buffer: Handle,
    /// Where it was mapped.
    queue: Handle,
}

// SAFETY: nobody else has the memory, and OpenCL objects may go from thread to thread.
unsafe impl Send for Pinned {}

impl Pinned {
    pub(super) fn new(context: &Handle, on: &Handle) -> Asked<Pinned> {
        let flags = cl_memory::CL_MEM_READ_WRITE | cl_memory::CL_MEM_ALLOC_HOST_PTR;
        // SAFETY: without a host pointer there is no memory of ours that OpenCL could use.
        let raw = unsafe { cl_memory::create_buffer(context.raw, flags, PIECE, ptr::null_mut()) };
        let raw = raw.map_err(|code| refused("pinned memory", code))?;
        let buffer = Handle { raw, release: cl_memory::release_mem_object };
        let (flags, mut to) = (cl_memory::CL_MAP_READ | cl_memory::CL_MAP_WRITE, ptr::null_mut());
        // SAFETY: the buffer has so many bytes, and the call comes back when it is mapped.
        let event = unsafe {
            queue::enqueue_map_buffer(on.raw, raw, CL_TRUE, flags, 0, PIECE, &mut to, 0, ptr::null())
        };
        release(event.map_err(|code| refused("pinned memory", code))?);
        // A driver that says that all went well and gives nothing is out of it.
        let bytes =
            NonNull::new(to.cast::<u8>()).ok_or_else(|| refused("pinned memory", super::NO_HOST_MEMORY))?;
        // SAFETY: it is a queue, and released as often as it is retained.
        unsafe { queue::retain_command_queue(on.raw) }.map_err(|code| refused("pinned memory", code))?;
        let queue = Handle { raw: on.raw, release: queue::release_command_queue };
        // SAFETY: so many bytes were mapped to be written. What they hold before is the driver's.
        unsafe { bytes.as_ptr().write_bytes(0, PIECE) };
        Ok(Pinned { bytes, buffer, queue })
    }

    /// Its bytes, for as long as the device is at none of them.
    pub(super) fn bytes(&mut self) -> &mut [u8] {
        // SAFETY: so many bytes were mapped to read and to write, they were zeros or what was copied there,
        // and `&mut` says that nobody on the host is at them.
        unsafe { std::slice::from_raw_parts_mut(self.bytes.as_ptr(), PIECE) }
    }
}

impl Drop for Pinned {
    fn drop(&mut self) {
        // SAFETY: it was mapped once, on this queue, and nobody has its bytes any more.
        let event = unsafe {
            let to = self.bytes.as_ptr().cast();
            queue::enqueue_unmap_mem_object(self.queue.raw, self.buffer.raw, to, 0, ptr::null())
        };
        event.into_iter().for_each(release);
    }
}
