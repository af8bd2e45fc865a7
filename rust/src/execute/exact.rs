//! Sums of updates that are rounded once from the real number that they are (`precision="exact"`).

use std::ops::Range;

use super::tile::AdapterRows;
use crate::adapter::factors::Pair;
use crate::error::Result;
use crate::kernel::convert::widen_f64;
use crate::kernel::exact::{Target, round, store};
use crate::kernel::{ExactFactors, ExactOperand, InstructionSet, Recomputed};
use crate::tensor::dtype::Dtype;
use crate::tensor::orientation::Orientation;

/// A product with the two numbers that it is multiplied by, scale and weight.
pub(super) type ExactProduct = (Pair, Orientation, [f64; 2]);

/// All that becomes of the rows of a segment.
#[derive(Debug)]
pub(crate) struct ExactSum {
    products: ExactFactors,
    origin: ExactOrigin,
}

/// What products are added to.
#[derive(Debug)]
pub(super) enum ExactOrigin {
    /// W₀.
    Weight,
    /// An adapter's tensor, which stands in its place.
    Replacement(AdapterRows),
    /// W₀ + Σ wᵢ·(Sᵢ − W₀).
    Mixture(Vec<(f64, AdapterRows)>),
}

/// Rows in the type of the weight, and where they lie in their segment.
#[derive(Clone, Copy)]
pub(super) struct ExactTile<'a> {
    pub rows: &'a Range<usize>,
    pub dtype: &'a Dtype,
    pub stored: &'a [u8],
}

impl ExactSum {
    /// Packs products of rows that are stored as `from` and written as `to`.
    pub(super) fn new(
        set: InstructionSet,
        (from, to): (&Dtype, &Dtype),
        shape: (usize, usize),
        products: &[ExactProduct],
        origin: ExactOrigin,
    ) -> Self {
        let operands: Vec<_> = (products.iter())
            .map(|(pair, orientation, coefficient)| ExactOperand {
                factors: pair.operand(1.0),
                orientation: *orientation,
                coefficient: *coefficient,
            })
            .collect();
        let from = match &origin {
            ExactOrigin::Replacement(own) => own.dtype(),
            _ => from,
        };
        Self { products: ExactFactors::pack(set, (from, to), shape, &operands), origin }
    }

    /// Merges whole rows. Returns whether every element is finite.
    ///
    /// # Errors
    /// That a file changed, or [`crate::Error::Io`].
    pub(super) fn merge_rows(
        &self,
        set: InstructionSet,
        tile: ExactTile<'_>,
        (to, target): (&Dtype, &mut [u8]),
        recomputed: &mut Recomputed,
    ) -> Result<bool> {
        let ExactTile { rows, dtype, stored } = tile;
        let columns = self.products.columns();
        match &self.origin {
            ExactOrigin::Weight => Ok(self.products.merge_rows(
                set,
                rows.start,
                (dtype, stored),
                (to, target),
                recomputed,
            )),
            ExactOrigin::Replacement(own) => {
                let bytes = own.bytes(rows, columns)?;
                let from = (own.dtype(), &bytes[..]);
                Ok(self.products.merge_rows(set, rows.start, from, (to, target), recomputed))
            }
            ExactOrigin::Mixture(all) => {
                let own = self.widened(all, rows)?;
                let mut is_finite = true;
                let places = target.chunks_exact_mut(to.size());
                for (index, (weight, place)) in
                    widen_f64(dtype, stored).iter().zip(places).enumerate()
                {
                    let value = if weight.is_finite() {
                        let (row, column) = (rows.start + index / columns, index % columns);
                        let mixed = own.iter().flat_map(|(share, values)| {
                            [[*share, 1.0, 1.0, values[index]], [*share, -1.0, 1.0, *weight]]
                        });
                        let terms = self.products.terms(row, column).chain(mixed);
                        let terms = std::iter::once([1.0, 1.0, 1.0, *weight]).chain(terms);
                        round(terms, Target::of(to), recomputed)
                    } else {
                        *weight
                    };
                    is_finite &= value.is_finite();
                    store(to, value, place);
                }
                Ok(is_finite)
            }
        }
    }

    /// Computes elements that are not finite again: those that somebody else could not decide. Returns
    /// whether all are finite then.
    ///
    /// # Panics
    /// If there is more to it than products that are added to W₀.
    pub(super) fn decide(
        &self,
        tile: ExactTile<'_>,
        (to, target): (&Dtype, &mut [u8]),
        recomputed: &mut Recomputed,
    ) -> bool {
        let ExactTile { rows, dtype, stored } = tile;
        assert!(matches!(self.origin, ExactOrigin::Weight), "nothing else is computed elsewhere");
        let columns = self.products.columns();
        let mut is_finite = true;
        let places = target.chunks_exact_mut(to.size()).zip(stored.chunks_exact(dtype.size()));
        for (index, (place, stored)) in places.enumerate() {
            if widen_f64(to, place)[0].is_finite() {
                continue;
            }
            let weight = widen_f64(dtype, stored)[0];
            let (row, column) = (rows.start + index / columns, index % columns);
            let value = if weight.is_finite() {
                recomputed.near_ties += 1;
                let terms = std::iter::once([1.0, 1.0, 1.0, weight]);
                round(terms.chain(self.products.terms(row, column)), Target::of(to), recomputed)
            } else {
                weight
            };
            is_finite &= value.is_finite();
            store(to, value, place);
        }
        is_finite
    }

    fn widened(
        &self,
        all: &[(f64, AdapterRows)],
        rows: &Range<usize>,
    ) -> Result<Vec<(f64, Vec<f64>)>> {
        let columns = self.products.columns();
        let own = all
            .iter()
            .map(|(share, own)| Ok((*share, widen_f64(own.dtype(), &own.bytes(rows, columns)?))));
        own.collect()
    }

    /// What is to be added to W₀ in one row, as near as f32 tells.
    ///
    /// # Errors
    /// As [`ExactSum::merge_rows`].
    pub(super) fn changes(&self, row: usize, before: &[f32]) -> Result<Vec<f32>> {
        let rows = row..row + 1;
        let mut changes = self.products.row(row);
        let columns = self.products.columns();
        let own = match &self.origin {
            ExactOrigin::Weight => Vec::new(),
            ExactOrigin::Replacement(own) => {
                vec![(1.0, widen_f64(own.dtype(), &own.bytes(&rows, columns)?))]
            }
            ExactOrigin::Mixture(all) => self.widened(all, &rows)?,
        };
        for (share, values) in own {
            for ((change, value), before) in changes.iter_mut().zip(values).zip(before) {
                *change += share * (value - f64::from(*before));
            }
        }
        Ok(changes.into_iter().map(|change| change as f32).collect())
    }
}
