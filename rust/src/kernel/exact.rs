//! Merged weights as a definition: the real number W + Σ s·w·(B·A), with every stored number and the
//! scale s and the weight w of each update as they are, rounded once to the type of the output, to
//! nearest even. A sum that is zero is +0. What computes it, and in which order, changes no bit.
//!
//! An element is computed in floating point with a bound on its error. Where both ends of that
//! interval round to the same number, that is the number, for rounding is monotone; where they do not,
//! the element is computed again in more digits, in the end in whole numbers of any length. Bounds are
//! those of a chain of n operations, |error| ≤ γ·Σ|terms| with γ = n·u / (1 − n·u) (Higham, «Accuracy
//! and Stability of Numerical Algorithms», 2nd ed., §3.1), and Σ|terms| of a product's element is at
//! most ‖row‖·‖column‖ (Cauchy and Schwarz).

mod element;
mod filter;
mod integers;

use serde::{Deserialize, Serialize};

use super::InstructionSet;
use super::convert::{self, widen_f64};
use super::pack::Operand;
use crate::tensor::dtype::Dtype;
use crate::tensor::orientation::Orientation;
pub(crate) use element::{Target, round, store};
use filter::Filter;

/// How many elements the first bound did not decide.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Recomputed {
    /// Elements so near to the middle between two numbers that they were computed in more digits.
    pub near_ties: u64,
    /// Those of them that whole numbers decided: ties, and what is nearer to one than double precision
    /// tells.
    pub in_integers: u64,
}

impl Recomputed {
    /// Adds those of another part.
    pub fn add(&mut self, other: Self) {
        self.near_ties += other.near_ties;
        self.in_integers += other.in_integers;
    }
}

/// A product s·w·B·A as it is read from an adapter.
#[derive(Debug, Clone, Copy)]
pub struct ExactOperand<'a> {
    /// The factors; their coefficient is not used.
    pub factors: Operand<'a>,
    /// The way in which it lies on the weight.
    pub orientation: Orientation,
    /// Two numbers whose product is the coefficient.
    pub coefficient: [f64; 2],
}

/// All products of one tensor, side by side along the rank.
#[derive(Debug)]
pub struct ExactFactors {
    rows: usize,
    columns: usize,
    /// For each index of the rank, the two numbers whose product is the coefficient.
    coefficients: Vec<[f64; 2]>,
    /// Rows × rank, as stored.
    left: Vec<f64>,
    /// Rank × columns, as stored.
    right: Vec<f64>,
    /// ‖·‖₂ of the left factor's rows, coefficients included, and of the right factor's columns.
    row_norms: Vec<f64>,
    column_norms: Vec<f64>,
    /// For weights and outputs that f32 can bound.
    filter: Option<Filter>,
}

impl ExactFactors {
    /// Packs the operands for a weight of `rows` × `columns` elements of the type `from`, written as `to`.
    ///
    /// # Panics
    /// If an operand's bytes do not have the length that rank and shape ask for.
    pub fn pack(
        set: InstructionSet,
        (from, to): (&Dtype, &Dtype),
        (rows, columns): (usize, usize),
        operands: &[ExactOperand<'_>],
    ) -> Self {
        let rank = operands.iter().map(|operand| operand.factors.rank).sum();
        let mut this = Self {
            rows,
            columns,
            coefficients: Vec::with_capacity(rank),
            left: vec![0.0; rows * rank],
            right: vec![0.0; rank * columns],
            row_norms: Vec::new(),
            column_norms: Vec::new(),
            filter: None,
        };
        for ExactOperand { factors, orientation, coefficient } in operands {
            let first = this.coefficients.len();
            this.coefficients.extend(std::iter::repeat_n(*coefficient, factors.rank));
            let a = widen_f64(factors.a_dtype, factors.a);
            let b = widen_f64(factors.b_dtype, factors.b);
            let (inputs, outputs) = match orientation {
                Orientation::OutIn => (columns, rows),
                Orientation::InOut => (rows, columns),
            };
            let own = factors.rank;
            assert!(a.len() == own * inputs && b.len() == outputs * own, "of the weight's shape");
            for k in 0..own {
                let right = &mut this.right[(first + k) * columns..][..columns];
                match orientation {
                    Orientation::OutIn => right.copy_from_slice(&a[k * inputs..][..inputs]),
                    Orientation::InOut => {
                        let values = b.iter().skip(k).step_by(own);
                        right.iter_mut().zip(values).for_each(|(to, value)| *to = *value);
                    }
                }
            }
            for row in 0..rows {
                let left = &mut this.left[row * rank + first..][..own];
                match orientation {
                    Orientation::OutIn => left.copy_from_slice(&b[row * own..][..own]),
                    Orientation::InOut => {
                        let values = a[row..].iter().step_by(inputs);
                        left.iter_mut().zip(values).for_each(|(to, value)| *to = *value);
                    }
                }
            }
        }
        this.find_norms();
        let narrow = matches!(to, Dtype::Bf16 | Dtype::F16) && *from != Dtype::F64;
        this.filter = narrow.then(|| Filter::new(set, &this));
        this
    }

    fn find_norms(&mut self) {
        let rank = self.rank();
        // What is so small that its square vanishes counts as much as this: a norm is zero where all
        // numbers are, and nowhere else.
        let square = |value: f64| match value {
            0.0 => 0.0,
            value => value * value + 1e-300,
        };
        let pairs = self.coefficients.iter();
        let scales: Vec<_> = pairs.map(|[scale, weight]| scale * weight).collect();
        self.row_norms = (0..self.rows)
            .map(|row| {
                let values = self.left[row * rank..][..rank].iter().zip(&scales);
                // Where the product vanishes, and neither number is zero, it is no zero.
                let scaled = values.map(|(value, scale)| match value * scale {
                    0.0 if *value != 0.0 && *scale != 0.0 => f64::MIN_POSITIVE,
                    product => product,
                });
                scaled.map(square).sum::<f64>().sqrt()
            })
            .collect();
        self.column_norms = vec![0.0; self.columns];
        for row in self.right.chunks_exact(self.columns.max(1)) {
            let squares = row.iter().map(|value| square(*value));
            self.column_norms.iter_mut().zip(squares).for_each(|(sum, square)| *sum += square);
        }
        self.column_norms.iter_mut().for_each(|sum| *sum = sum.sqrt());
    }

    fn rank(&self) -> usize {
        self.coefficients.len()
    }

    /// Elements of a row.
    pub fn columns(&self) -> usize {
        self.columns
    }

    /// What an element of the product is the sum of, each term a product of four numbers.
    pub(crate) fn terms(
        &self,
        row: usize,
        column: usize,
    ) -> impl Iterator<Item = [f64; 4]> + Clone + '_ {
        let left = &self.left[row * self.rank()..][..self.rank()];
        let right = self.right.iter().skip(column).step_by(self.columns.max(1));
        let pairs = self.coefficients.iter().zip(left).zip(right);
        pairs.map(|(([scale, weight], left), right)| [*scale, *weight, *left, *right])
    }

    /// A row of the product in f64, as near as that is.
    pub(crate) fn row(&self, row: usize) -> Vec<f64> {
        let mut sums = vec![0.0; self.columns];
        self.add_row(row, &mut sums);
        sums
    }

    fn add_row(&self, row: usize, sums: &mut [f64]) {
        let rank = self.rank();
        let left = self.left[row * rank..][..rank].iter().zip(&self.coefficients);
        for ((value, [scale, weight]), right) in left.zip(self.right.chunks_exact(self.columns)) {
            let factor = value * (scale * weight);
            sums.iter_mut().zip(right).for_each(|(sum, right)| *sum += factor * right);
        }
    }

    /// Merges whole rows, from `first_row` on. Returns whether every element is finite.
    ///
    /// # Panics
    /// If the tiles are not the same whole rows, or not of the types that were packed for.
    pub fn merge_rows(
        &self,
        set: InstructionSet,
        first_row: usize,
        (from, source): (&Dtype, &[u8]),
        (to, target): (&Dtype, &mut [u8]),
        recomputed: &mut Recomputed,
    ) -> bool {
        assert_eq!(source.len() / from.size(), target.len() / to.size(), "as many elements");
        if self.columns == 0 || source.is_empty() {
            return true;
        }
        if let Some(filter) = &self.filter {
            let widened;
            let (from, source) = if from == to || *from == Dtype::F32 {
                (from, source)
            } else {
                let mut wide = vec![0u8; source.len() / from.size() * 4];
                convert::convert(from, source, &Dtype::F32, &mut wide);
                widened = wide;
                (&Dtype::F32, &widened[..])
            };
            let mut doubtful = Vec::new();
            if filter.merge_rows(set, first_row, (from, source), (to, target), &mut doubtful) {
                recomputed.near_ties += doubtful.len() as u64;
                let target_type = Target::of(to);
                let mut finite = true;
                for index in doubtful {
                    let index = index as usize;
                    let (row, column) = (index / self.columns, index % self.columns);
                    let weight = widen_f64(from, &source[index * from.size()..][..from.size()])[0];
                    let terms = self.terms(first_row + row, column);
                    let value = element::merged(weight, terms, target_type, recomputed);
                    finite &= value.is_finite();
                    element::store(to, value, &mut target[index * to.size()..][..to.size()]);
                }
                return finite;
            }
        }
        self.merge_wide(first_row, (from, source), (to, target), recomputed)
    }

    /// The same without the filter, in f64: for wide types, and for rows in which something is not finite.
    fn merge_wide(
        &self,
        first_row: usize,
        (from, source): (&Dtype, &[u8]),
        (to, target): (&Dtype, &mut [u8]),
        recomputed: &mut Recomputed,
    ) -> bool {
        let target_type = Target::of(to);
        // Each term is rounded twice, and each addition once; the coefficient and the bound's own
        // roundings are among the rest.
        let share = (2 * self.rank() + 8) as f64 * 1.01 * f64::EPSILON / 2.0;
        let floor = (self.rank() + 1) as f64 * f64::MIN_POSITIVE;
        let mut sums = vec![0.0; self.columns];
        let mut finite = true;
        let rows = source.chunks_exact(self.columns * from.size());
        for (row, (source, target)) in
            rows.zip(target.chunks_exact_mut(self.columns * to.size())).enumerate()
        {
            let weights = widen_f64(from, source);
            let row = first_row + row;
            let row_norm = self.row_norms[row];
            if *to != Dtype::F64 {
                sums.fill(0.0);
                self.add_row(row, &mut sums);
            }
            for (column, weight) in weights.into_iter().enumerate() {
                let place = &mut target[column * to.size()..][..to.size()];
                if !weight.is_finite() {
                    convert::convert(
                        from,
                        &source[column * from.size()..][..from.size()],
                        to,
                        place,
                    );
                    finite = false;
                    continue;
                }
                if *to != Dtype::F64 {
                    let sum = weight + sums[column];
                    let product = row_norm * self.column_norms[column];
                    if product == 0.0 && weight == 0.0 {
                        element::store(to, 0.0, place);
                        continue;
                    }
                    let size = weight.abs() + product;
                    if let Some(value) = target_type.decided(sum, share * size + floor) {
                        finite &= value.is_finite();
                        element::store(to, value, place);
                        continue;
                    }
                    recomputed.near_ties += 1;
                }
                let value =
                    element::merged(weight, self.terms(row, column), target_type, recomputed);
                finite &= value.is_finite();
                element::store(to, value, place);
            }
        }
        finite
    }
}

#[cfg(test)]
mod tests;
