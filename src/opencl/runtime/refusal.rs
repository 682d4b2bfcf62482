//! What a device refuses to do, and what can be done about it.

use super::quirks;
use crate::error::{Error, Result};

/// What a call into OpenCL came back with instead of a result.
#[derive(Debug)]
#[cfg_attr(not(feature = "opencl"), allow(dead_code))] // Nobody refuses anything then.
pub(super) struct Refusal {
    pub(super) what: String,
    pub(super) code: i32,
    /// The name of the code.
    pub(super) name: &'static str,
}

pub(super) type Asked<T> = std::result::Result<T, Refusal>;

impl Refusal {
    fn error(self, hint: &str) -> Error {
        Error::opencl(self.what, format!("{} ({}){hint}", self.name, self.code))
    }

    pub(super) fn into_error(self) -> Error {
        let hint = if quirks::is_loss(self.code) { LOST } else { "" };
        self.error(hint)
    }
}

const LOST: &str = ": the device is lost, or a kernel on it has failed; what is on it is gone, open it again";

/// Does `act`; if there is no memory for it, does it once more after `relieve`.
///
/// Drivers may promise memory when a buffer is made, and look for it when something is queued that uses it.
/// Some say the same when a kernel has failed or the device is gone: then it does not come `alive` again.
/// The error otherwise is what `full` says.
pub(super) fn with_relief<T>(
    mut act: impl FnMut() -> Asked<T>,
    relieve: impl FnOnce() -> Asked<()>,
    alive: impl FnOnce() -> bool,
    full: impl FnOnce(Refusal) -> Error,
) -> Result<T> {
    let wants_memory = |refusal: &Refusal| quirks::is_want_of_memory(refusal.code);
    let first = match act() {
        Err(refusal) if wants_memory(&refusal) => refusal,
        done => return done.map_err(Refusal::into_error),
    };
    match relieve().and_then(|()| act()) {
        Ok(done) => Ok(done),
        Err(again) if !wants_memory(&again) => Err(again.into_error()),
        Err(_) if alive() => Err(full(first)),
        Err(again) => Err(again.error(LOST)),
    }
}

/// All that could be had, and why the rest could not. An error, the first one, only where that is nothing.
#[cfg_attr(not(feature = "opencl"), allow(dead_code))] // Nothing works then.
pub(super) fn what_works<T>(parts: impl Iterator<Item = Result<Vec<T>>>) -> Result<(Vec<T>, Vec<Error>)> {
    let (mut found, mut broken) = (vec![], vec![]);
    for part in parts {
        match part {
            Ok(part) => found.extend(part),
            Err(error) => broken.push(error),
        }
    }
    if found.is_empty() && !broken.is_empty() { Err(broken.swap_remove(0)) } else { Ok((found, broken)) }
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;

    use super::*;

    const NO_MEMORY: i32 = -4;
    const GONE: i32 = -36;

    fn refused(code: i32) -> Asked<u8> {
        Err(Refusal { what: "`kernel`".into(), code, name: "NAME" })
    }

    /// What comes of answers, one after the other, and what was done.
    fn run(answers: [Asked<u8>; 2], relief: Asked<u8>, is_alive: bool) -> (Result<u8>, Vec<&'static str>) {
        let (done, mut answers) = (RefCell::new(vec![]), answers.into_iter());
        let note = |what| done.borrow_mut().push(what);
        let result = with_relief(
            || {
                note("act");
                answers.next().expect("two at most")
            },
            || {
                note("relieve");
                relief.map(|_| ())
            },
            || is_alive,
            |_| Error::OutOfMemory { bytes: 7 },
        );
        (result, done.into_inner())
    }

    #[test]
    fn want_of_memory_is_tried_once_more() {
        let (result, done) = run([refused(NO_MEMORY), Ok(5)], Ok(0), true);
        assert_eq!((result.unwrap(), &done[..]), (5, &["act", "relieve", "act"][..]));
        let (result, _) = run([refused(NO_MEMORY), refused(NO_MEMORY)], Ok(0), true);
        assert!(matches!(result, Err(Error::OutOfMemory { bytes: 7 })));
        assert_eq!(run([Ok(1), Ok(2)], Ok(0), true).1, ["act"]);
    }

    #[test]
    fn a_lost_device_is_not_taken_for_a_full_one() {
        for (answers, relief, alive) in [
            ([refused(NO_MEMORY), refused(NO_MEMORY)], Ok(0), false),
            ([refused(NO_MEMORY), refused(GONE)], Ok(0), true),
            ([refused(NO_MEMORY), Ok(5)], refused(GONE), true),
            ([refused(GONE), Ok(5)], Ok(0), true),
        ] {
            let message = run(answers, relief, alive).0.unwrap_err().to_string();
            assert!(message.contains("the device is lost"), "{message}");
        }
        // A mistake of ours is neither.
        let message = run([refused(-51), Ok(5)], Ok(0), true).0.unwrap_err().to_string();
        assert_eq!(message, "OpenCL, `kernel`: NAME (-51)");
    }

    #[test]
    fn what_is_broken_hides_nothing_else() {
        let error = || Err(Error::opencl("platform", "broken"));
        let (found, broken) = what_works([Ok(vec![1]), error(), Ok(vec![2, 3])].into_iter()).unwrap();
        assert_eq!((found, broken.len()), (vec![1, 2, 3], 1));
        assert!(what_works([error(), Ok(Vec::<u8>::new())].into_iter()).is_err());
        assert!(what_works([Ok(Vec::<u8>::new())].into_iter()).unwrap().0.is_empty());
    }
}
