//! What the rounding of stored factors explains, and the types that hold them.

use super::factored::Rows;
use crate::adapter::Adapter;
use crate::adapter::factors::common;
use crate::linalg::{Matrix, singular_values};
use crate::measure::precision::Precision;
use crate::measure::spectrum::{Term, Update};
use crate::tensor::dtype::Dtype;

/// The narrowest type that holds the factors of all adapters, of those that factors are written in.
pub(crate) fn widest(adapters: &[Adapter]) -> Dtype {
    let tensors = adapters.iter().flat_map(|adapter| adapter.modules().values());
    let types = tensors.flat_map(|module| {
        let found = module.delta.tensors().into_iter().map(|(_, tensor)| tensor.dtype.clone());
        found.collect::<Vec<_>>()
    });
    let all = types.reduce(|one, other| common(&one, &other)).unwrap_or(Dtype::F32);
    match all {
        Dtype::F16 | Dtype::Bf16 | Dtype::F64 => all,
        _ => Dtype::F32,
    }
}

/// The singular value below which the rounding of the stored factors explains what is there: a bound on
/// ‖Σ s(E_B·A + B·E_A)‖₂ for independent errors of variance v = ulp²/12 in every element, with
/// ‖E‖₂ ≤ √(largest row sum of v) + √(largest column sum of v) (Bandeira and van Handel 2016,
/// arXiv:1408.6185).
pub(crate) fn floor(update: &Update<'_>) -> f64 {
    update.terms().iter().map(|term| floor_of(term, update.rows(), update.columns())).sum()
}

fn floor_of(term: &Term<'_>, rows: usize, columns: usize) -> f64 {
    let read = |values: &crate::measure::spectrum::Values<'_>, rows, columns| {
        let mut read = Rows::zeros(rows, columns);
        values.read(0, &mut read.values);
        read
    };
    let b = read(&term.left, rows, term.rank);
    let a = read(&term.right, term.rank, columns);
    let largest = |gram: &Matrix| singular_values(gram).first().copied().unwrap_or(0.0).sqrt();
    let (b_norm, a_norm) = (largest(&b.gram()), largest(&a.transposed().gram()));
    term.scale.abs() * (noise(&b) * a_norm + b_norm * noise(&a))
}

/// The bound on ‖E‖₂ of a factor's rounding.
fn noise(factor: &Rows) -> f64 {
    let precision = Precision::of(&factor.values);
    let mut columns = vec![0.0; factor.columns];
    let mut largest = 0.0f64;
    for row in factor.values.chunks_exact(factor.columns.max(1)) {
        let mut sum = 0.0;
        for (column, value) in columns.iter_mut().zip(row) {
            let variance = precision.variance(*value);
            sum += variance;
            *column += variance;
        }
        largest = largest.max(sum);
    }
    largest.sqrt() + columns.into_iter().fold(0.0, f64::max).sqrt()
}
