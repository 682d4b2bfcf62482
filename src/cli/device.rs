//! The device to compute on, as it is asked for.

use std::path::PathBuf;
use std::str::FromStr;

use randlora::{Device, Error, Precision, Result};

use super::output::size;
use super::precision::PrecisionArgs;

/// Where to compute.
#[derive(Debug, clap::Args)]
pub(crate) struct DeviceArgs {
    /// What to compute on: `cpu`, or `opencl` for the first OpenCL device and `opencl:N` for device N of
    /// `randlora devices` (in builds with the feature `opencl`).
    #[arg(long, default_value = "cpu", value_name = "DEVICE")]
    device: Place,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Place {
    Cpu,
    OpenCl(usize),
}

impl FromStr for Place {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Place, String> {
        let index = match (text, text.strip_prefix("opencl")) {
            ("cpu", _) => return Ok(Place::Cpu),
            (_, Some("")) => Some(0),
            (_, Some(rest)) => rest.strip_prefix(':').and_then(|index| index.parse().ok()),
            _ => None,
        };
        index.map(Place::OpenCl).ok_or("`cpu`, `opencl` or `opencl:N` is needed".into())
    }
}

impl DeviceArgs {
    /// The device, computing in this precision.
    ///
    /// # Errors
    /// [`Error::OpenCl`] where there is none, [`Error::Config`] for another precision than f32 on an OpenCL
    /// device.
    pub(crate) fn open(&self, precision: &PrecisionArgs) -> Result<Device> {
        let Place::OpenCl(index) = self.device else { return Ok(precision.device()) };
        if precision.asked() != Precision::F32 {
            let message = "OpenCL devices compute in f32: leave `--precision` out, or use `--device cpu`";
            return Err(Error::Config { what: "--precision", message: message.into() });
        }
        match cache() {
            Some(folder) => Device::opencl_cached(index, folder),
            None => Device::opencl(index),
        }
    }
}

/// Where built kernels are kept: the platform's folder for what can be made again.
fn cache() -> Option<PathBuf> {
    let from = |name: &str| std::env::var_os(name).filter(|path| !path.is_empty()).map(PathBuf::from);
    let folder = if cfg!(windows) {
        from("LOCALAPPDATA")
    } else if cfg!(target_os = "macos") {
        from("HOME").map(|home| home.join("Library/Caches"))
    } else {
        from("XDG_CACHE_HOME").or_else(|| from("HOME").map(|home| home.join(".cache")))
    };
    folder.map(|folder| folder.join("randlora"))
}

/// Says on standard error what was asked of an OpenCL device in all, and which operations it had no kernel for.
pub(crate) fn note_use(device: &Device) {
    if !matches!(device, Device::OpenCl(_)) {
        return;
    }
    let (counts, memory) = (device.opencl_counts(), device.memory());
    eprintln!(
        "{device}: {} kernels launched, waited for {} times, {} there and {} back, at most {} in use",
        counts.launches,
        counts.waits,
        size(counts.bytes_up as u64),
        size(counts.bytes_down as u64),
        size(memory.peak_bytes as u64)
    );
    let trips: Vec<String> = device.round_trips().iter().map(|(op, n)| format!("{op} {n}")).collect();
    if !trips.is_empty() {
        eprintln!("note: computed on the host for want of a kernel: {}", trips.join(", "));
    }
}
