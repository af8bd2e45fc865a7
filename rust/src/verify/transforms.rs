//! The formulas of transforms in f64, element by element: written for verification alone, so that a
//! mistake in what a merge computes is none of what it is held against.

use std::ops::Range;

use faer::Mat;
use faer::linalg::solvers::Solve;

use crate::adapter::deltas::{
    Cayley, Generalized, Orthogonal, RescaledInputs, RotatedInputs, Scaled,
};
use crate::adapter::{Delta, Formula};
use crate::error::Result;
use crate::kernel::convert::widen_f64;
use crate::tensor::safetensors::Tensor;

/// A matrix as a function of row and column.
type Elements<'a> = dyn Fn(usize, usize) -> f64 + 'a;

/// What a formula makes of a weight of so many outputs and inputs, row after row; of the given outputs
/// of it, where these rows are not all.
///
/// # Errors
/// [`crate::Error::Adapter`] if a file changed meanwhile, [`crate::Error::Io`].
pub(super) fn exact(
    formula: Formula<'_>,
    weight: &Elements<'_>,
    [rows, columns]: [usize; 2],
    scaling: f64,
    outputs: Option<&Range<u64>>,
) -> Result<Vec<f64>> {
    let first = outputs.map_or(0, |outputs| outputs.start as usize);
    match formula {
        Formula::Generalized(own) => generalized(own, weight, [rows, columns], scaling, first),
        Formula::Scaled(own) => scaled(own, weight, [rows, columns], first),
        Formula::Orthogonal(own) => orthogonal(own, weight, [rows, columns], first),
        Formula::RotatedInputs(own) => rotated_inputs(own, weight, [rows, columns]),
        Formula::RescaledInputs(own) => rescaled_inputs(own, weight, [rows, columns], scaling),
    }
}

/// All elements of a matrix of that shape.
fn matrix([rows, columns]: [usize; 2], element: impl Fn(usize, usize) -> f64) -> Vec<f64> {
    let cells = (0..rows).flat_map(|row| (0..columns).map(move |column| (row, column)));
    cells.map(|(row, column)| element(row, column)).collect()
}

/// A stored tensor, and the number of columns where all extents but the first are one.
fn stored(tensor: &Tensor) -> Result<(Vec<f64>, usize)> {
    let columns = tensor.shape[1..].iter().product::<u64>() as usize;
    Ok((tensor.read_f64()?, columns))
}

/// W[o, i, k] + s·(Σⱼ Σᵣ W[o, j, k]·a1[j, r]·a2[r, i] + Σ b1[o, r]·b2[r, i, k]), the latter with a core
/// Σ b1[o, r]·m[r, q, k]·b2[q, i].
fn generalized(
    own: &Generalized,
    weight: &Elements<'_>,
    shape: [usize; 2],
    scaling: f64,
    first: usize,
) -> Result<Vec<f64>> {
    let [(a1, width), (a2, inputs)] = [stored(&own.of_weight[0])?, stored(&own.of_weight[1])?];
    let [(b1, rank), (b2, _)] = [stored(&own.added[0])?, stored(&own.added[1])?];
    let core = own.core.as_ref().map(stored).transpose()?;
    let kernel = shape[1] / inputs;
    let middle = matrix([shape[0], width * kernel], |row, column| {
        let (r, place) = (column / kernel, column % kernel);
        (0..inputs).map(|from| weight(row, from * kernel + place) * a1[from * width + r]).sum()
    });
    let right = match &core {
        None => b2,
        Some((core, across)) => matrix([rank, shape[1]], |r, column| {
            let (input, place) = (column / kernel, column % kernel);
            let term = |q| core[r * across + q * kernel + place] * b2[q * inputs + input];
            (0..across / kernel).map(term).sum()
        }),
    };
    Ok(matrix(shape, |row, column| {
        let (input, place) = (column / kernel, column % kernel);
        let term = |r| middle[(row * width + r) * kernel + place] * a2[r * inputs + input];
        let of_weight: f64 = (0..width).map(term).sum();
        let term = |r| b1[(first + row) * rank + r] * right[r * shape[1] + column];
        let added: f64 = (0..rank).map(term).sum();
        weight(row, column) + scaling * (of_weight + added)
    }))
}

/// W[o, i, k]·f[o] or W[o, i, k]·f[i].
fn scaled(
    own: &Scaled,
    weight: &Elements<'_>,
    shape: [usize; 2],
    first: usize,
) -> Result<Vec<f64>> {
    let factors = own.vector.read_f64()?;
    let begin = if own.less_one { 1.0 } else { 0.0 };
    Ok(matrix(shape, |row, column| {
        let position = if own.on_input { column * factors.len() / shape[1] } else { first + row };
        weight(row, column) * (begin + factors[position])
    }))
}

/// R of every block: (I + Q)·(I − Q)⁻¹ = 2·(I − Q)⁻¹ − I with Q = X − Xᵀ.
fn rotations(own: &Orthogonal) -> Result<Vec<Mat<f64>>> {
    let (values, _) = stored(&own.blocks)?;
    let extent = own.blocks.shape[own.blocks.shape.len() - 1] as usize;
    let count = values.len() / (extent * extent);
    let skew = |block: usize, row: usize, column: usize| {
        let at = |row, column| values[(block * extent + row) * extent + column];
        at(row, column) - at(column, row)
    };
    let cells =
        matrix([count * extent, extent], |row, column| skew(row / extent, row % extent, column));
    let norm = cells.iter().map(|value| value.powi(2)).sum::<f64>().sqrt();
    let limit = match &own.constraint {
        Some(constraint) => constraint.read_f64()?[0] * own.outputs() as f64,
        None => 0.0,
    };
    let shrink = if limit > 0.0 { (limit / norm).min(1.0) } else { 1.0 };
    let one = Mat::<f64>::identity(extent, extent);
    let rotation = |block| {
        let minus = Mat::from_fn(extent, extent, |row, column| {
            one[(row, column)] - shrink * skew(block, row, column)
        });
        faer::Scale(2.0) * minus.partial_piv_lu().solve(&one) - &one
    };
    Ok((0..count).map(rotation).collect())
}

/// Rᵀ on each run of rows; in stages R on the rows in the order of a butterfly.
fn orthogonal(
    own: &Orthogonal,
    weight: &Elements<'_>,
    [rows, columns]: [usize; 2],
    first: usize,
) -> Result<Vec<f64>> {
    let rotations = rotations(own)?;
    let extent = rotations[0].nrows();
    let mut result = if own.blocks.shape.len() == 3 {
        matrix([rows, columns], |row, column| {
            let (block, start) = ((first + row) / extent, row / extent * extent);
            let term = |k| rotations[block][(k, row % extent)] * weight(start + k, column);
            (0..extent).map(term).sum()
        })
    } else {
        let count = own.blocks.shape[1] as usize;
        let mut now = matrix([rows, columns], weight);
        for (stage, rotations) in rotations.chunks_exact(count).enumerate() {
            let half = (extent << stage) / 2;
            // The row in the middle order's place: two that are `half` apart lie side by side.
            let row_at = |place: usize| {
                let (run, within) = (place / (2 * half), place % (2 * half));
                run * 2 * half + within / 2 + half * (within % 2)
            };
            let mut next = vec![0.0; now.len()];
            for place in 0..rows {
                let (block, begin) = (place / extent, place / extent * extent);
                for column in 0..columns {
                    next[row_at(place) * columns + column] = (0..extent)
                        .map(|k| {
                            let value = now[row_at(begin + k) * columns + column];
                            rotations[block][(place - begin, k)] * value
                        })
                        .sum();
                }
            }
            now = next;
        }
        now
    };
    if let Some(rescale) = &own.rescale {
        let factors = rescale.read_f64()?;
        for (place, value) in result.iter_mut().enumerate() {
            *value *= factors[first + place / columns];
        }
    }
    Ok(result)
}

/// W[o, i] times Rᵀ on each run of inputs, of an embedding times R.
fn rotated_inputs(
    own: &RotatedInputs,
    weight: &Elements<'_>,
    shape: [usize; 2],
) -> Result<Vec<f64>> {
    let (values, each) = stored(&own.elements)?;
    let extent = own.extent as usize;
    let count = values.len() / each;
    // Where the element of that row and column, which lies above the diagonal, is stored.
    let position =
        |row: usize, column: usize| row * extent - row * (row + 1) / 2 + column - row - 1;
    let skew = |block: usize| {
        let above = &values[block * each..(block + 1) * each];
        let norm = (2.0 * above.iter().map(|value| value.powi(2)).sum::<f64>()).sqrt();
        let limit = own.bound.map(|bound| bound / (count as f64).sqrt());
        let shrink = limit.filter(|limit| norm > *limit).map_or(1.0, |limit| limit / norm);
        Mat::from_fn(extent, extent, |row, column| match row.cmp(&column) {
            std::cmp::Ordering::Less => shrink * above[position(row, column)],
            std::cmp::Ordering::Equal => 0.0,
            std::cmp::Ordering::Greater => -shrink * above[position(column, row)],
        })
    };
    let one = Mat::<f64>::identity(extent, extent);
    let rotation = |block| {
        let skew = skew(block);
        match own.cayley {
            // (I − Q)·(I + Q)⁻¹ = 2·(I + Q)⁻¹ − I.
            Cayley::Exact => faer::Scale(2.0) * (&one + &skew).partial_piv_lu().solve(&one) - &one,
            // By Horner's rule.
            Cayley::Series(terms) => {
                let mut sum = Mat::<f64>::zeros(extent, extent);
                for coefficient in series(terms).into_iter().rev() {
                    sum = &sum * &skew + faer::Scale(coefficient) * &one;
                }
                sum
            }
        }
    };
    let rotations: Vec<Mat<f64>> = (0..count).map(rotation).collect();
    Ok(matrix(shape, |row, column| {
        let block = if own.shared { 0 } else { column / extent };
        let begin = column / extent * extent;
        let factor = |k| match own.of_embedding {
            true => rotations[block][(k, column - begin)],
            false => rotations[block][(column - begin, k)],
        };
        (0..extent).map(|k| factor(k) * weight(row, begin + k)).sum()
    }))
}

/// I + 2Q, and from three terms on I + 2Q + 2Q² and further powers up to that of the number of terms
/// less one, at least the third; the last counts once.
fn series(terms: u64) -> Vec<f64> {
    match terms {
        0 | 1 => vec![1.0],
        2 => vec![1.0, 2.0],
        3 | 4 => vec![1.0, 2.0, 2.0, 1.0],
        _ => {
            let middle = std::iter::repeat_n(2.0, terms as usize - 2);
            std::iter::once(1.0).chain(middle).chain(std::iter::once(1.0)).collect()
        }
    }
}

/// V[o, i, k]·m[i]/√(Σ V[·, i, ·]²) with V = W + s·B·A.
fn rescaled_inputs(
    own: &RescaledInputs,
    weight: &Elements<'_>,
    [rows, columns]: [usize; 2],
    scaling: f64,
) -> Result<Vec<f64>> {
    let pair = own.delta.pair(None, None)?;
    let (b, a) = (widen_f64(&pair.b_dtype, &pair.b), widen_f64(&pair.a_dtype, &pair.a));
    let magnitudes = own.magnitude.read_f64()?;
    let kernel = columns / magnitudes.len();
    let sum = matrix([rows, columns], |row, column| {
        let product: f64 =
            (0..pair.rank).map(|r| b[row * pair.rank + r] * a[r * columns + column]).sum();
        weight(row, column) + scaling * product
    });
    let mut squares = vec![0.0; magnitudes.len()];
    for (place, value) in sum.iter().enumerate() {
        squares[place % columns / kernel] += value * value;
    }
    Ok(matrix([rows, columns], |row, column| {
        let input = column / kernel;
        match squares[input] {
            0.0 => 0.0,
            square => sum[row * columns + column] * magnitudes[input] / square.sqrt(),
        }
    }))
}
