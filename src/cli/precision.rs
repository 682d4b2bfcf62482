//! What layers are computed in, as it is asked for and as it is done.

use randlora::{Device, Precision};

/// What layers are computed in.
#[derive(Debug, clap::Args)]
pub(crate) struct PrecisionArgs {
    /// What layers' products are computed in. bf16 rounds their factors and sums in f32: faster on
    /// processors with AMX (on Linux) and AMD's with AVX512-BF16, on all others it is f32.
    #[arg(long, value_enum, default_value = "f32")]
    precision: PrecisionName,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum PrecisionName {
    F32,
    Bf16,
}

impl PrecisionArgs {
    /// What was asked for.
    pub(crate) fn asked(&self) -> Precision {
        match self.precision {
            PrecisionName::F32 => Precision::F32,
            PrecisionName::Bf16 => Precision::Bf16,
        }
    }

    /// A device that computes so, and a line on standard error where it will not.
    pub(crate) fn device(&self) -> Device {
        let asked = self.asked();
        if !asked.is_native() {
            eprintln!(
                "note: bf16 is no faster here (no AMX, no AVX512-BF16 of AMD's): computing in f32 instead of {asked}"
            );
        }
        Device::with_precision(asked)
    }
}

/// What a device computes layers in.
pub(crate) fn done(device: &Device) -> Precision {
    if device.precision().is_native() { device.precision() } else { Precision::F32 }
}
