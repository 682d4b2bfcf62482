//! One error type. Every variant says what is wrong and what to change.

use std::{fmt, io, path::PathBuf};

use crate::shape::Shape;

/// What every fallible function of this crate returns.
pub type Result<T> = std::result::Result<T, Error>;

/// Everything that can go wrong.
#[derive(Debug)]
#[non_exhaustive]
pub enum Error {
    /// The shapes given to an operation do not fit together.
    Shape {
        /// The operation.
        op: &'static str,
        /// What does not fit, and what would.
        message: String,
    },
    /// An operation was given a data type that it does not compute in.
    DType {
        /// The operation.
        op: &'static str,
        /// What was found and what to do.
        message: String,
    },
    /// An index lies outside of what it points into.
    Index {
        /// The operation.
        op: &'static str,
        /// The index.
        index: usize,
        /// The number of places there are.
        size: usize,
    },
    /// Memory for a tensor could not be had.
    OutOfMemory {
        /// The bytes that were asked for.
        bytes: usize,
    },
    /// `backward` was called on a tensor that no tracked tensor leads to.
    NotTracked {
        /// The shape of that tensor.
        shape: Shape,
    },
    /// `backward` reached an operation whose saved values an earlier `backward` has used up.
    GraphUsed {
        /// The operation.
        op: &'static str,
    },
    /// A vjp read a value that its `saves` did not ask to keep.
    NotSaved {
        /// The shape of the value.
        shape: Shape,
    },
    /// A vjp broke its contract: a gradient is missing or does not fit its input.
    Vjp {
        /// The operation.
        op: &'static str,
        /// The position of the input.
        input: usize,
        /// What is wrong with the gradient.
        message: String,
    },
    /// A gradient was wanted for something that stays frozen by design.
    Frozen {
        /// The operation.
        op: &'static str,
        /// The input, and why it has no gradient.
        message: String,
    },
    /// A setting is out of range or contradicts another one.
    Config {
        /// The setting.
        what: &'static str,
        /// What is wrong and what would be right.
        message: String,
    },
    /// A name or pattern matches no layer.
    NoMatch {
        /// What was looked for.
        wanted: String,
        /// What is there.
        available: Vec<String>,
    },
    /// A trained parameter got no gradient.
    NoGradient {
        /// Its name.
        parameter: String,
    },
    /// An analytic gradient disagrees with the numeric one.
    Gradcheck {
        /// What was checked.
        what: String,
        /// ⟨v, Jᵀw⟩ from the vjp.
        analytic: f64,
        /// ⟨w, Jv⟩ from the central difference.
        numeric: f64,
        /// The seed that shows it.
        seed: u64,
    },
    /// A value that must be finite is not.
    NonFinite {
        /// The value.
        what: String,
        /// The optimiser step at which it was seen (0 is the first).
        step: usize,
    },
    /// Data that was read is malformed.
    Data {
        /// What was read.
        what: String,
        /// What is wrong with it, and where.
        message: String,
    },
    /// An OpenCL device is not there, or refused what it was asked for.
    OpenCl {
        /// What was asked for: a kernel by its name, a file of kernels, `open`.
        what: String,
        /// The driver's reason, for kernels that do not build with the log.
        message: String,
    },
    /// The operating system refused to read or write a file.
    Io {
        /// The file.
        path: PathBuf,
        /// Its reason.
        source: io::Error,
    },
}

impl Error {
    pub(crate) fn shape(op: &'static str, message: impl Into<String>) -> Error {
        Error::Shape { op, message: message.into() }
    }

    pub(crate) fn dtype(op: &'static str, message: impl Into<String>) -> Error {
        Error::DType { op, message: message.into() }
    }

    pub(crate) fn config(what: &'static str, message: impl Into<String>) -> Error {
        Error::Config { what, message: message.into() }
    }

    pub(crate) fn opencl(what: impl Into<String>, message: impl Into<String>) -> Error {
        Error::OpenCl { what: what.into(), message: message.into() }
    }

    pub(crate) fn data(what: impl Into<String>, message: impl Into<String>) -> Error {
        Error::Data { what: what.into(), message: message.into() }
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Error::Shape { op, message } => write!(f, "{op}: {message}"),
            Error::DType { op, message } => write!(f, "{op}: {message}"),
            Error::Index { op, index, size } => {
                write!(f, "{op}: index {index} is outside of 0..{size}")
            }
            Error::OutOfMemory { bytes } => {
                write!(f, "no memory for {bytes} bytes: use a smaller batch or a shorter sequence")
            }
            Error::NotTracked { shape } => write!(
                f,
                "backward: this tensor of shape {shape} depends on no tracked tensor; make a leaf \
                 with `track()`, or run the model with a context that tracks"
            ),
            Error::GraphUsed { op } => write!(
                f,
                "backward: the graph behind `{op}` was used up by an earlier backward; run the \
                 forward again, or sum the losses and call backward once"
            ),
            Error::NotSaved { shape } => write!(
                f,
                "a vjp read a value of shape {shape} that was not kept after forward: name it in \
                 the op's `saves`"
            ),
            Error::Vjp { op, input, message } => {
                write!(f, "the vjp of `{op}` is wrong for its input {input}: {message}")
            }
            Error::Frozen { op, message } => write!(f, "{op}: {message}"),
            Error::Config { what, message } => write!(f, "{what}: {message}"),
            Error::NoMatch { wanted, available } => {
                write!(f, "{wanted} matches no layer; there are: {}", available.join(", "))
            }
            Error::NoGradient { parameter } => write!(
                f,
                "the trained parameter `{parameter}` got no gradient: the loss does not depend on \
                 it; freeze it or use it"
            ),
            Error::Gradcheck { what, analytic, numeric, seed } => write!(
                f,
                "{what}: the vjp gives {analytic:e} where the central difference gives {numeric:e} \
                 (seed {seed})"
            ),
            Error::NonFinite { what, step } => write!(
                f,
                "{what} is not finite at step {step}: lower the learning rate or the adapter's \
                 scale, or clip the gradients"
            ),
            Error::Data { what, message } => write!(f, "{what}: {message}"),
            Error::OpenCl { what, message } => write!(f, "OpenCL, {what}: {message}"),
            Error::Io { path, source } => write!(f, "{}: {source}", path.display()),
        }
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            Error::Io { source, .. } => Some(source),
            _ => None,
        }
    }
}

const _: () = {
    const fn portable<T: Send + Sync + 'static>() {}
    portable::<Error>();
};
