//! The reader of the embedded digits takes any bytes: an error or images that fit together.
#![no_main]

use libfuzzer_sys::fuzz_target;
use randlora::data::digits::{CLASSES, INK, parse};

fuzz_target!(|data: &[u8]| {
    if let Ok(digits) = parse(data) {
        assert_eq!(digits.labels().len(), digits.images().len());
        assert!(digits.labels().iter().all(|&label| (label as usize) < CLASSES));
        assert!(digits.images().iter().flatten().all(|&pixel| pixel <= INK));
    }
});
