//! The driver of a build without the feature `opencl`: there are no devices, and so nothing to call.

use std::path::Path;

use super::refusal::Asked;
use super::{Argument, Grid, Listed};
use crate::error::{Error, Result};

/// No device is of this type, and so on.
pub(super) enum Id {}
pub(super) enum Driver {}
#[derive(Debug)]
pub(super) enum Memory {}
pub(super) enum Program {}

pub(super) fn list() -> Result<Listed> {
    Err(Error::opencl("devices", "this build has none: build with the feature `opencl`"))
}

impl Driver {
    pub(super) fn open(id: Id, _: bool) -> Result<Driver> {
        match id {}
    }

    pub(super) fn allocate(&self, _: usize) -> Asked<Memory> {
        match *self {}
    }

    pub(super) fn write(&self, _: &Memory, _: &[u8]) -> Asked<bool> {
        match *self {}
    }

    pub(super) fn read(&self, _: &Memory, _: usize, _: &mut [u8]) -> Asked<()> {
        match *self {}
    }

    pub(super) fn finish(&self) -> Asked<()> {
        match *self {}
    }

    pub(super) fn build(&self, _: &'static str, _: &str, _: &str, _: Option<&Path>) -> Result<Program> {
        match *self {}
    }

    pub(super) fn launch(&self, _: &mut Program, _: &'static str, _: &[Argument<'_>], _: Grid) -> Asked<()> {
        match *self {}
    }
}
