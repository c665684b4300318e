//! In the place of [`crate::mpi`] in a build without the feature: a library that nobody can have.

use pillion_collectives::{Launch, Reduction};
use pillion_kernels::DType;

use crate::Error;
use crate::case::Case;
use crate::operation::Operation;

#[derive(Clone, Copy)]
pub(crate) enum Call {}

impl Call {
    pub(crate) fn name(self) -> &'static str {
        match self {}
    }
}

pub(crate) enum Library {}

impl Library {
    pub(crate) fn begin(_launch: &Launch) -> Result<Library, Error> {
        Err(Error::Usage(
            "--compare mpi needs the feature `mpi` of pillion-benches: build with `--features mpi`".into(),
        ))
    }

    pub(crate) fn name(&self) -> &str {
        match *self {}
    }

    pub(crate) fn has(&self, _dtype: DType, _reduction: Reduction) -> bool {
        match *self {}
    }

    pub(crate) fn calls(&self, _operation: Operation) -> &'static [Call] {
        match *self {}
    }

    pub(crate) fn run(&self, _call: Call, _case: &mut Case) -> Result<(), Error> {
        match *self {}
    }

    pub(crate) fn finish(self) -> Result<(), Error> {
        match self {}
    }
}
