//! What a device says of itself.

use crate::error::Error;

/// The OpenCL devices of a machine.
#[derive(Debug)]
#[non_exhaustive]
pub struct OpenClDevices {
    /// Those that answer.
    pub found: Vec<OpenClInfo>,
    /// What is wrong with platforms and devices that do not.
    pub broken: Vec<Error>,
}

/// An OpenCL device, as `randlora devices` lists it.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct OpenClInfo {
    /// The platform that it belongs to: a driver.
    pub platform: String,
    /// Its name.
    pub name: String,
    /// Who made it.
    pub vendor: String,
    /// The version of OpenCL, as in `OpenCL 1.2`, with what the driver adds to it.
    pub version: String,
    /// The version of the driver.
    pub driver: String,
    /// `GPU`, `CPU` or `accelerator`.
    pub kind: &'static str,
    /// Bytes of memory.
    pub memory: usize,
    /// Whether that is the memory of the host.
    pub shares_memory: bool,
    /// The largest buffer that it has, in bytes.
    pub largest_buffer: usize,
    /// Bytes that the work-items of a group share.
    pub local_memory: usize,
    /// The most work-items in a group.
    pub largest_group: usize,
    /// Its compute units.
    pub compute_units: usize,
    /// Its extensions.
    pub extensions: Vec<String>,
}

impl OpenClInfo {
    /// Whether it computes in f64. Nothing here needs it to.
    pub fn has_f64(&self) -> bool {
        self.has("cl_khr_fp64")
    }

    /// Whether it computes in f16. Nothing here needs it to: f16 is widened when it is read.
    pub fn has_f16(&self) -> bool {
        self.has("cl_khr_fp16")
    }

    fn has(&self, extension: &str) -> bool {
        self.extensions.iter().any(|e| e == extension)
    }
}
