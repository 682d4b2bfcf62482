//! What devices there are.

use std::sync::PoisonError;

use opencl3::device::{CL_DEVICE_TYPE_ALL, CL_DEVICE_TYPE_CPU, CL_DEVICE_TYPE_GPU, Device};
use opencl3::error_codes::{ClError, DLOPEN_RUNTIME_LOAD_FAILED};
use opencl3::platform::{Platform, get_platforms};
use opencl3::types::{cl_device_id, cl_int};

use super::super::refusal::what_works;
use super::super::{Listed, OpenClInfo, quirks};
use super::{Id, refused};
use crate::error::{Error, Result};

/// The code for a machine on which no driver is installed (`cl_khr_icd`).
const PLATFORM_NOT_FOUND: cl_int = -1001;
const DEVICE_NOT_FOUND: cl_int = -1;

/// All devices of all platforms, and what is wrong with platforms that do not answer.
pub(in super::super) fn list() -> Result<Listed> {
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
        code => refused("devices", code).into_error(),
    })?;
    what_works(platforms.iter().flat_map(|platform| match platform.get_devices(CL_DEVICE_TYPE_ALL) {
        Ok(devices) => devices.into_iter().map(|id| of(platform, id)).collect(),
        Err(ClError(DEVICE_NOT_FOUND)) => vec![],
        Err(ClError(code)) => vec![Err(unanswered(platform, code))],
    }))
}

fn of(platform: &Platform, id: cl_device_id) -> Result<Vec<(Id, OpenClInfo)>> {
    let info = describe(platform, id).map_err(|ClError(code)| unanswered(platform, code))?;
    Ok(vec![(Id(id), info)])
}

fn unanswered(platform: &Platform, code: cl_int) -> Error {
    let name = platform.name().unwrap_or_default();
    refused(format!("devices of the platform `{}`", name.trim_end_matches('\0').trim()), code).into_error()
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
        shares_memory: device.host_unified_memory()?,
        largest_buffer: size(device.max_mem_alloc_size()?),
        local_memory: size(device.local_mem_size()?),
        largest_group: device.max_work_group_size()?,
        compute_units: device.max_compute_units()? as usize,
        extensions: text(device.extensions()?).split_whitespace().map(String::from).collect(),
    })
}
