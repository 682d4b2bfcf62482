//! Where devices and drivers differ, in one place.
//!
//! Kernels use OpenCL C 1.2 without extensions, and count on three things: groups of 64 work-items that
//! meet at barriers, 16 KiB of local memory, and arithmetic that keeps infinities and NaN.

use super::GROUP;
use super::info::OpenClInfo;
use crate::error::{Error, Result};

/// Held while devices are asked for: PoCL makes them at the first question, and hands out what is half made to
/// a second thread that asks meanwhile.
#[cfg(feature = "opencl")]
pub(super) static FIRST_QUESTION: std::sync::Mutex<()> = std::sync::Mutex::new(());

/// Local memory that the kernels use at most.
const LOCAL_MEMORY: usize = 16 << 10;

/// An error where a device lacks what the kernels need.
pub(super) fn check(info: &OpenClInfo) -> Result<()> {
    let refuse = |why: String| {
        Err(Error::opencl("open", format!("{} cannot be used: {why}; choose another device", info.name)))
    };
    // Apple's driver for processors runs groups with barriers one work-item at a time, whatever it says.
    if info.platform.contains("Apple") && info.kind == "CPU" {
        return refuse("Apple's OpenCL for processors has no barriers".into());
    }
    if info.largest_group < GROUP {
        return refuse(format!("it runs groups of {} work-items, {GROUP} are needed", info.largest_group));
    }
    if info.local_memory < LOCAL_MEMORY {
        return refuse(format!(
            "it has {} bytes of local memory, {LOCAL_MEMORY} are needed",
            info.local_memory
        ));
    }
    Ok(())
}

/// How programs are built for a device.
///
/// Never with `-cl-fast-relaxed-math` or one of its parts: a mask is −∞, and a NaN has to be seen.
pub(super) fn build_options(info: &OpenClInfo) -> String {
    let mut options = String::from("-cl-std=CL1.2");
    // The largest tile of a matrix product whose group the device runs. It does not change the order of a sum.
    if tile(info) == 64 {
        options.push_str(" -DTHREADS=16");
    }
    options
}

/// Rows and columns of a tile of a matrix product: 64 by 16 × 16 work-items, or 32 by 8 × 8.
///
/// Processors (PoCL, Intel's) run a group's work-items one after another on one core, where the smaller
/// tile stays in the first cache.
pub(super) fn tile(info: &OpenClInfo) -> usize {
    if info.kind == "CPU" || info.largest_group < 256 { 32 } else { 64 }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn info() -> OpenClInfo {
        OpenClInfo {
            platform: "A platform".into(),
            name: "A card".into(),
            vendor: String::new(),
            version: "OpenCL 1.2".into(),
            driver: String::new(),
            kind: "GPU",
            memory: 1 << 30,
            largest_buffer: 1 << 28,
            local_memory: 32 << 10,
            largest_group: 256,
            compute_units: 4,
            extensions: vec!["cl_khr_fp64".into()],
        }
    }

    #[test]
    fn what_cannot_be_used_says_why() {
        assert!(check(&info()).is_ok() && info().has_f64() && !info().has_f16());
        let small = check(&OpenClInfo { largest_group: 1, ..info() }).unwrap_err().to_string();
        assert!(small.contains("groups of 1 work-items, 64 are needed"), "{small}");
        assert!(check(&OpenClInfo { local_memory: 1 << 10, ..info() }).is_err());
        assert!(check(&OpenClInfo { platform: "Apple".into(), kind: "CPU", ..info() }).is_err());
    }

    #[test]
    fn tiles_follow_the_device() {
        assert_eq!(tile(&info()), 64);
        assert_eq!(tile(&OpenClInfo { largest_group: 128, ..info() }), 32);
        assert_eq!(build_options(&OpenClInfo { kind: "CPU", ..info() }), "-cl-std=CL1.2");
    }
}
