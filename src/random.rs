//! Random numbers as functions of a key and a position: nothing is drawn "next", so any part of a
//! stream can be made alone, in any order, on any thread.
//!
//! The generator is ChaCha with 8 rounds (`chacha`), 64-bit counter and 64-bit stream number (Bernstein's
//! layout). The key's 32 bytes are the seed as a little-endian u64, then zeros.
//! A word is one little-endian u32 of the key stream. Every formula below uses only operations that
//! IEEE 754 rounds correctly, so its result is the same on any machine.

mod chacha;

/// The words `from..from + out.len()` of stream `stream` under the key made of `seed`.
pub(crate) fn words(seed: u64, stream: u64, from: u64, out: &mut [u32]) {
    let (mut block, mut skipped) = (from / chacha::BLOCK as u64, (from % chacha::BLOCK as u64) as usize);
    let mut rest = out;
    while !rest.is_empty() {
        let (now, after) = rest.split_at_mut((chacha::WORDS - skipped).min(rest.len()));
        match <&mut [u32; chacha::WORDS]>::try_from(&mut *now) {
            // Where all are wanted they are made in place, without a copy.
            Ok(now) => chacha::blocks(seed, stream, block, now),
            Err(_) => {
                let mut made = [0; chacha::WORDS];
                chacha::blocks(seed, stream, block, &mut made);
                now.copy_from_slice(&made[skipped..][..now.len()]);
            }
        }
        (rest, skipped) = (after, 0);
        block = block.wrapping_add(chacha::LANES as u64);
    }
}

/// One number out of two, every bit of which depends on every bit of both (the finaliser of
/// SplitMix64 over their mixture): how a key for a part is made from the key of the whole.
pub(crate) fn mix(a: u64, b: u64) -> u64 {
    let mut z = a ^ b.wrapping_add(0x9e37_79b9_7f4a_7c15).wrapping_mul(0xd1b5_4a32_d192_ed03);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// Uniform in (−1, 1): the 24 high bits of a word, as odd multiples of 2⁻²⁴, symmetric about 0.
pub(crate) fn symmetric(word: u32) -> f64 {
    (2.0 * (word >> 8) as f64 + 1.0 - 16_777_216.0) / 16_777_216.0
}

/// The standard normal quantile of the probability (word + ½)/2³², by Wichura's algorithm AS 241
/// (PPND16, relative accuracy about 1e-16).
pub(crate) fn normal(word: u32) -> f64 {
    let p = (word as f64 + 0.5) / 4_294_967_296.0;
    let q = p - 0.5;
    if q.abs() <= 0.425 {
        let r = 0.180625 - q * q;
        return q * ratio(r, &CENTRE);
    }
    let tail = if q < 0.0 { p } else { 1.0 - p };
    let r = (-ln(tail)).sqrt();
    let z = if r <= 5.0 { ratio(r - 1.6, &MIDDLE) } else { ratio(r - 5.0, &TAIL) };
    if q < 0.0 { -z } else { z }
}

/// The natural logarithm of 0 < x < 1 from basic operations alone, so that it is the same
/// everywhere: with x = 2ᵉ·m and s = (m − 1)/(m + 1), ln m = 2·(s + s³/3 + s⁵/5 + …).
fn ln(x: f64) -> f64 {
    let exponent = (x.to_bits() >> 52) as i64 - 1023;
    let mut m = f64::from_bits((x.to_bits() & ((1 << 52) - 1)) | (1023 << 52));
    let mut e = exponent as f64;
    if m > std::f64::consts::SQRT_2 {
        m *= 0.5;
        e += 1.0;
    }
    let s = (m - 1.0) / (m + 1.0);
    let series = (0..=12).rev().fold(0.0, |sum, i| sum * s * s + 1.0 / (2 * i + 1) as f64);
    e * std::f64::consts::LN_2 + 2.0 * s * series
}

/// Numerator over denominator, coefficients of rising powers.
fn ratio(x: f64, [above, below]: &[[f64; 8]; 2]) -> f64 {
    let polynomial = |c: &[f64; 8]| c.iter().rev().fold(0.0, |sum, &c| sum * x + c);
    polynomial(above) / polynomial(below)
}

const CENTRE: [[f64; 8]; 2] = [
    [
        3.3871328727963666080,
        1.3314166789178437745e2,
        1.9715909503065514427e3,
        1.3731693765509461125e4,
        4.5921953931549871457e4,
        6.7265770927008700853e4,
        3.3430575583588128105e4,
        2.5090809287301226727e3,
    ],
    [
        1.0,
        4.2313330701600911252e1,
        6.8718700749205790830e2,
        5.3941960214247511077e3,
        2.1213794301586595867e4,
        3.9307895800092710610e4,
        2.8729085735721942674e4,
        5.2264952788528545610e3,
    ],
];
const MIDDLE: [[f64; 8]; 2] = [
    [
        1.42343711074968357734,
        4.63033784615654529590,
        5.76949722146069140550,
        3.64784832476320460504,
        1.27045825245236838258,
        2.41780725177450611770e-1,
        2.27238449892691845833e-2,
        7.74545014278341407640e-4,
    ],
    [
        1.0,
        2.05319162663775882187,
        1.67638483018380384940,
        6.89767334985100004550e-1,
        1.48103976427480074590e-1,
        1.51986665636164571966e-2,
        5.47593808499534494600e-4,
        1.05075007164441684324e-9,
    ],
];
const TAIL: [[f64; 8]; 2] = [
    [
        6.65790464350110377720,
        5.46378491116411436990,
        1.78482653991729133580,
        2.96560571828504891230e-1,
        2.65321895265761230930e-2,
        1.24266094738807843860e-3,
        2.71155556874348757815e-5,
        2.01033439929228813265e-7,
    ],
    [
        1.0,
        5.99832206555887937690e-1,
        1.36929880922735805310e-1,
        1.48753612908506148525e-2,
        7.86869131145613259100e-4,
        1.84631831751005468180e-5,
        1.42151175831644588870e-7,
        2.04426310338993978564e-15,
    ],
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn any_part_of_a_stream_can_be_made_alone() {
        let mut whole = [0; 100];
        words(7, 3, 0, &mut whole);
        let mut part = [0; 9];
        words(7, 3, 41, &mut part);
        assert_eq!(part, whole[41..50]);
        words(7, 4, 41, &mut part);
        assert_ne!(part, whole[41..50]);
    }

    /// From within a block and from its ends, less than what is made at once and more.
    #[test]
    fn parts_of_any_length_are_those_of_the_whole() {
        let mut whole = [0; 1500];
        whole.chunks_mut(1).enumerate().for_each(|(i, word)| words(7, 3, i as u64, word));
        for from in [0, 1, 15, 16, 250, 256, 300] {
            for n in [0, 1, 5, 256, 257, 600, 1000] {
                let mut part = vec![0; n];
                words(7, 3, from as u64, &mut part);
                assert_eq!(part, whole[from..from + n], "{n} from {from}");
            }
        }
    }

    #[test]
    fn quantiles() {
        // word + ½ over 2³² next to p = ½, and known quantiles from tables.
        assert!(normal(1 << 31).abs() < 1e-9);
        for (p, z) in [(0.975, 1.959963984540054), (0.999, 3.090232306167813), (1e-6, -4.753424308822899)] {
            let word = (p * 4294967296.0 - 0.5) as u32;
            assert!((normal(word) - z).abs() < 1e-4, "{p}: {}", normal(word));
        }
        assert_eq!(normal(5), -normal(u32::MAX - 5));
        assert!(normal(0) < -6.2 && normal(0) > -6.6);
    }

    #[test]
    fn moments() {
        let mut w = vec![0; 100_000];
        words(1, 2, 0, &mut w);
        let moments = |f: fn(u32) -> f64| {
            let mean = w.iter().map(|&w| f(w)).sum::<f64>() / w.len() as f64;
            (mean, w.iter().map(|&w| f(w).powi(2)).sum::<f64>() / w.len() as f64)
        };
        let (mean, square) = moments(normal);
        assert!(mean.abs() < 0.02 && (square - 1.0).abs() < 0.02);
        let (mean, square) = moments(symmetric);
        assert!(mean.abs() < 0.02 && (square - 1.0 / 3.0).abs() < 0.01);
    }

    #[test]
    fn logarithm() {
        for x in [1e-10, 0.074, 0.3, 0.5, 0.71, 0.999] {
            assert!((ln(x) - f64::ln(x)).abs() <= 4e-16 * f64::ln(x).abs().max(0.3), "{x}");
        }
    }
}
