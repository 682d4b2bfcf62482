//! `randlora devices`: what there is to compute on.

use randlora::{Device, OpenClDevices, OpenClInfo};
use serde_json::{Value, json};

use super::Failure;
use super::output::{say, size};

/// List the OpenCL devices of this machine.
#[derive(Debug, clap::Args)]
#[command(after_help = "Example:
  randlora devices
  randlora finetune --device opencl:0 …")]
pub(crate) struct Args {
    /// Print one JSON array.
    #[arg(long)]
    json: bool,
}

/// Runs the command.
pub(crate) fn run(args: &Args) -> Result<(), Failure> {
    let OpenClDevices { found: devices, broken, .. } = Device::opencl_devices()?;
    broken.iter().for_each(|error| eprintln!("note: {error}"));
    if args.json {
        return Ok(say(Value::from(devices.iter().map(object).collect::<Vec<_>>()))?);
    }
    for (i, device) in devices.iter().enumerate() {
        say(format_args!("opencl:{i}  {} ({}, {})", device.name, device.kind, device.vendor))?;
        say(format_args!("  platform  {}, {}, driver {}", device.platform, device.version, device.driver))?;
        say(format_args!(
            "  memory    {}, {} in one buffer, {} in a group",
            size(device.memory as u64),
            size(device.largest_buffer as u64),
            size(device.local_memory as u64)
        ))?;
        say(format_args!(
            "  computes  {} units, groups of {} at most{}{}",
            device.compute_units,
            device.largest_group,
            if device.has_f64() { ", f64" } else { "" },
            if device.has_f16() { ", f16" } else { "" }
        ))?;
    }
    if devices.is_empty() {
        say("there are platforms, but no devices")?;
    }
    Ok(())
}

fn object(device: &OpenClInfo) -> Value {
    json!({
        "name": device.name,
        "kind": device.kind,
        "vendor": device.vendor,
        "platform": device.platform,
        "version": device.version,
        "driver": device.driver,
        "memory_bytes": device.memory,
        "shares_memory": device.shares_memory,
        "largest_buffer_bytes": device.largest_buffer,
        "local_memory_bytes": device.local_memory,
        "largest_group": device.largest_group,
        "compute_units": device.compute_units,
        "f64": device.has_f64(),
        "f16": device.has_f16(),
        "extensions": device.extensions,
    })
}
