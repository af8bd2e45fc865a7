//! What rounding takes away of a merge's changes, measured while they are made: of every value that is
//! quantised again, and of a sample of what is rounded to 16 bits.

use std::ops::Range;

use serde::{Deserialize, Serialize};

use crate::plan::{PlannedTensor, Update};

/// From this share of the changes on, what rounding took away is a warning.
pub const LOST: f64 = 0.2;
/// Of the tiles of a tensor that is rounded to 16 bits, every so many gives its first row, and so does
/// the first of every run of rows that the same updates change.
const SAMPLED: usize = 16;

/// What rounding took away.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct RoundingLoss {
    /// ‖written − exact‖ / ‖exact − base‖ over all values that were looked at.
    pub lost: f64,
    /// The share of the values that should move and are the base's.
    pub unmoved: f64,
    /// How many values were looked at.
    pub values: u64,
}

/// Whether the first of some rows of a tensor is looked at.
pub(super) fn is_sampled(tensor: &PlannedTensor, rows: &Range<usize>) -> bool {
    let number = rows.start / rows.len().max(1);
    let first = rows.start as u64;
    let begins = |update: &Update| {
        let changed = update.slice.rows.as_ref();
        changed.is_some_and(|changed| changed.start == first || changed.end == first)
    };
    tensor.rounded_dtype().size() == 2
        && (number.is_multiple_of(SAMPLED) || tensor.updates().iter().any(begins))
}

/// Sums of squares and counts, which can be added up over parts of a merge. As plain data they are five
/// numbers.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
#[serde(from = "FiveNumbers", into = "FiveNumbers")]
pub struct RoundingSums {
    error: f64,
    change: f64,
    moving: u64,
    unmoved: u64,
    values: u64,
}

type FiveNumbers = (f64, f64, u64, u64, u64);

impl From<FiveNumbers> for RoundingSums {
    fn from((error, change, moving, unmoved, values): FiveNumbers) -> Self {
        Self { error, change, moving, unmoved, values }
    }
}

impl From<RoundingSums> for FiveNumbers {
    fn from(sums: RoundingSums) -> Self {
        (sums.error, sums.change, sums.moving, sums.unmoved, sums.values)
    }
}

impl RoundingSums {
    /// Adds values: the base's, what was to be added to each, and what is written.
    pub fn add_changes(&mut self, before: &[f32], changes: &[f32], written: &[f32]) {
        for ((before, change), written) in before.iter().zip(changes).zip(written) {
            let change = f64::from(*change);
            let moved = f64::from(*written) - f64::from(*before);
            self.add_one(change, moved);
        }
    }

    /// Adds values: the base's, the exact result, and what is written.
    pub fn add_results(&mut self, before: &[f32], exact: &[f32], written: &[f32]) {
        for ((before, exact), written) in before.iter().zip(exact).zip(written) {
            let before = f64::from(*before);
            self.add_one(f64::from(*exact) - before, f64::from(*written) - before);
        }
    }

    fn add_one(&mut self, change: f64, moved: f64) {
        // What is not finite says nothing of rounding.
        if change.is_finite() && moved.is_finite() {
            self.error += (moved - change) * (moved - change);
            self.change += change * change;
            self.moving += u64::from(change != 0.0);
            self.unmoved += u64::from(change != 0.0 && moved == 0.0);
            self.values += 1;
        }
    }

    /// Adds those of another part.
    pub fn add(&mut self, other: &Self) {
        self.error += other.error;
        self.change += other.change;
        self.moving += other.moving;
        self.unmoved += other.unmoved;
        self.values += other.values;
    }

    /// What they come to; `None` where nothing changed that was looked at.
    pub fn loss(&self) -> Option<RoundingLoss> {
        (self.change > 0.0).then(|| RoundingLoss {
            lost: (self.error / self.change).sqrt(),
            unmoved: self.unmoved as f64 / self.moving.max(1) as f64,
            values: self.values,
        })
    }
}

impl RoundingLoss {
    /// The warning where that is much.
    pub fn warning(&self) -> Option<String> {
        (self.lost >= LOST).then(|| {
            format!(
                "rounding takes away {:.0} % of what the adapters change, and {:.0} % of the weights \
                 that should move do not; write a wider dtype (dtype=\"float32\", --dtype float32) to \
                 keep it",
                100.0 * self.lost.min(1.0),
                100.0 * self.unmoved
            )
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_half_that_stays_is_half_lost() {
        let mut sums = RoundingSums::default();
        assert_eq!(sums.loss(), None);
        sums.add_results(&[1.0, 1.0, 5.0], &[2.0, 2.0, f32::NAN], &[2.0, 1.0, f32::NAN]);
        let loss = sums.loss().expect("something changed");
        assert!((loss.lost - 0.5f64.sqrt()).abs() < 1e-12);
        assert_eq!((loss.unmoved, loss.values), (0.5, 2));
        let mut other = RoundingSums::default();
        other.add_changes(&[1.0, 1.0], &[1.0, 1.0], &[2.0, 1.0]);
        assert_eq!(other.loss(), Some(loss));
        assert!(loss.warning().expect("much is lost").contains("71 %"));
    }
}
