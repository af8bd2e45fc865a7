//! How often two updates push an entry in the same direction.

use rayon::prelude::*;

use crate::error::Result;
use crate::linalg::{LongSide, Matrix};
use crate::measure::spectrum::Update;

/// Entries that are looked at where there are more: the share is then known to about 0.001.
pub const SIGN_SAMPLES: usize = 1 << 18;

/// Entries of one unit of work, which has its own stream of random numbers.
const CHUNK: usize = 1 << 13;

/// The share of entries that two updates change in the same direction.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct SignAgreement {
    /// Agreeing over compared entries; NaN where none was compared.
    pub share: f64,
    /// Entries that neither update leaves as they are.
    pub compared: u64,
    /// Those of them with one sign.
    pub agreeing: u64,
    /// Whether the entries were drawn at random; else they are all there are.
    pub sampled: bool,
}

/// Compares the signs of the updates' entries, each computed in f64: all of them where there are
/// at most `samples`, else so many drawn with replacement by a generator seeded with `seed`.
///
/// # Errors
/// [`crate::Error::Argument`] when the updates' shapes differ.
pub fn sign_agreement(
    x: &Update<'_>,
    y: &Update<'_>,
    samples: usize,
    seed: u64,
) -> Result<SignAgreement> {
    x.check_shape(y)?;
    let total = x.rows().saturating_mul(x.columns());
    let sampled = total > samples;
    let count = if sampled { samples } else { total };
    let (x, y) = (Entries::of(x), Entries::of(y));
    let visit = |start: usize| {
        let mut random = Random::new(seed, start as u64);
        let (mut compared, mut agreeing) = (0u64, 0u64);
        for index in start..count.min(start + CHUNK) {
            let (row, column) = if sampled {
                (random.below(x.rows), random.below(x.columns))
            } else {
                (index / x.columns, index % x.columns)
            };
            // The sign of the product could be lost to underflow.
            let (a, b) = (x.get(row, column), y.get(row, column));
            let is_compared = a.abs() > 0.0 && b.abs() > 0.0;
            compared += u64::from(is_compared);
            agreeing += u64::from(is_compared && (a > 0.0) == (b > 0.0));
        }
        (compared, agreeing)
    };
    let starts = (0..count.div_ceil(CHUNK)).map(|chunk| chunk * CHUNK);
    let (compared, agreeing) = if count <= CHUNK {
        starts.map(visit).next().unwrap_or((0, 0))
    } else {
        let starts: Vec<usize> = starts.collect();
        starts.into_par_iter().map(visit).reduce(|| (0, 0), |a, b| (a.0 + b.0, a.1 + b.1))
    };
    Ok(SignAgreement { share: agreeing as f64 / compared as f64, compared, agreeing, sampled })
}

/// The factors laid out so that an entry is a dot product of two contiguous pieces.
struct Entries {
    rows: usize,
    columns: usize,
    left: Matrix,
    right: Matrix,
}

impl Entries {
    fn of(update: &Update<'_>) -> Self {
        let across = |side: &dyn LongSide| {
            let mut matrix = Matrix::zeros(side.length(), side.width());
            side.read(0, side.length(), &mut matrix.data);
            matrix.transposed()
        };
        let mut left = across(&update.left());
        let scales = update.scales();
        for row in 0..left.columns {
            for (value, scale) in left.column_mut(row).iter_mut().zip(&scales) {
                *value *= scale;
            }
        }
        Self {
            rows: update.rows(),
            columns: update.columns(),
            left,
            right: across(&update.right()),
        }
    }

    fn get(&self, row: usize, column: usize) -> f64 {
        let terms = self.left.column(row).iter().zip(self.right.column(column));
        terms.map(|(b, a)| b * a).sum()
    }
}

/// SplitMix64 (Steele, Lea & Flood 2014).
struct Random(u64);

impl Random {
    fn new(seed: u64, stream: u64) -> Self {
        let mut random = Self(seed);
        random.0 = random.next() ^ stream.wrapping_mul(0xd134_2543_de82_ef95);
        random
    }

    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut bits = self.0;
        bits = (bits ^ (bits >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        bits = (bits ^ (bits >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        bits ^ (bits >> 31)
    }

    /// A number below `limit`, uniform up to limit/2⁶⁴.
    fn below(&mut self, limit: usize) -> usize {
        ((u128::from(self.next()) * limit as u128) >> 64) as usize
    }
}
