//! Weights whose outputs or inputs are turned by orthogonal matrices.

use std::ops::Range;

use super::transforms::{first_of, no_product};
use crate::adapter::delta::{Delta, Expert, Formula, Transform};
use crate::adapter::factors::Pair;
use crate::adapter::matrix::Matrix;
use crate::error::{Error, Result};
use crate::tensor::safetensors::Tensor;

/// Runs of outputs turned by orthogonal matrices: Diag-OFT (Qiu et al. 2023, arXiv:2306.07280), or in
/// stages with butterflies between them BOFT (Liu et al. 2024, arXiv:2311.06243), as LyCORIS has them.
#[derive(Debug, Clone)]
pub struct Orthogonal {
    /// (n, b, b), or (stages, n, b, b).
    pub blocks: Tensor,
    /// The constraint on the blocks' joint norm, a share of the outputs; none without one.
    pub constraint: Option<Tensor>,
    /// A factor on each output.
    pub rescale: Option<Tensor>,
}

impl Orthogonal {
    fn is_staged(&self) -> bool {
        self.blocks.shape.len() == 4
    }

    /// R = (I + Q)·(I − Q)⁻¹ of every block, with Q = X − Xᵀ, which is shrunk where all of them
    /// together are larger than the constraint allows.
    fn rotations(&self) -> Result<Vec<Matrix>> {
        let extent = self.blocks.shape[self.blocks.shape.len() - 1] as usize;
        let values = self.blocks.read_f64()?;
        let mut skew: Vec<Matrix> = values
            .chunks_exact(extent * extent)
            .map(|block| {
                let block = Matrix { rows: extent, columns: extent, values: block.to_vec() };
                let transposed = block.transposed();
                let pairs = block.values.iter().zip(&transposed.values);
                let values = pairs.map(|(value, other)| value - other).collect();
                Matrix { values, ..transposed }
            })
            .collect();
        let allowed = match &self.constraint {
            Some(constraint) => constraint.read_f64()?[0] * self.outputs() as f64,
            None => 0.0,
        };
        let all = skew.iter().flat_map(|block| &block.values);
        let norm = all.map(|value| value * value).sum::<f64>().sqrt();
        if allowed > 0.0 && norm > allowed {
            let factor = allowed / norm;
            skew.iter_mut().flat_map(|block| &mut block.values).for_each(|value| *value *= factor);
        }
        let rotation = |skew: Matrix| {
            let (mut plus, mut minus) = (Matrix::identity(extent), Matrix::identity(extent));
            plus.values.iter_mut().zip(&skew.values).for_each(|(to, from)| *to += from);
            minus.values.iter_mut().zip(&skew.values).for_each(|(to, from)| *to -= from);
            // The two commute.
            minus.solve(&plus).ok_or_else(|| {
                let message = format!("{} holds numbers that are not finite", self.blocks.name);
                Error::adapter(self.blocks.file().path(), message)
            })
        };
        skew.into_iter().map(rotation).collect()
    }
}

impl Delta for Orthogonal {
    fn tensors(&self) -> Vec<(&'static str, &Tensor)> {
        let constraint = self.constraint.iter().map(|tensor| ("the constraint", tensor));
        let rescale = self.rescale.iter().map(|tensor| ("the factors on the outputs", tensor));
        let blocks = std::iter::once(("the orthogonal blocks", &self.blocks));
        blocks.chain(constraint).chain(rescale).collect()
    }

    fn outputs(&self) -> u64 {
        let shape = &self.blocks.shape;
        shape[shape.len() - 3] * shape[shape.len() - 1]
    }

    /// 0, for nothing tells it.
    fn input_shape(&self) -> Vec<u64> {
        vec![0]
    }

    fn rank(&self) -> u64 {
        self.blocks.shape[self.blocks.shape.len() - 1]
    }

    fn form(&self) -> String {
        "Orthogonal".to_owned()
    }

    fn pair(&self, _expert: Option<Expert>, _outputs: Option<&Range<u64>>) -> Result<Pair> {
        no_product(&self.blocks, "an orthogonal adapter")
    }

    fn transform(&self) -> Option<&dyn Transform> {
        Some(self)
    }

    fn has_product(&self) -> bool {
        false
    }

    fn algorithm(&self) -> &'static str {
        if self.is_staged() { "BOFT" } else { "OFT" }
    }
}

impl Transform for Orthogonal {
    fn name(&self) -> &'static str {
        if self.is_staged() { "BOFT" } else { "Diag-OFT" }
    }

    /// Whole blocks; butterflies mix all rows.
    fn is_of_rows(&self, outputs: &Range<u64>) -> bool {
        let extent = self.rank();
        let is_cut_at = |row: u64| row.is_multiple_of(extent);
        *outputs == (0..self.outputs())
            || !self.is_staged() && is_cut_at(outputs.start) && is_cut_at(outputs.end)
    }

    fn formula(&self) -> Formula<'_> {
        Formula::Orthogonal(self)
    }

    fn apply(
        &self,
        weight: &mut Matrix,
        _scaling: f64,
        outputs: Option<&Range<u64>>,
    ) -> Result<()> {
        let rotations = self.rotations()?;
        let extent = rotations[0].rows;
        if self.is_staged() {
            let count = self.blocks.shape[1] as usize;
            for (stage, rotations) in rotations.chunks_exact(count).enumerate() {
                let order = butterfly(weight.rows, (extent << stage) / 2);
                let mut gathered = Matrix::zeros(weight.rows, weight.columns);
                for (place, row) in order.iter().enumerate() {
                    gathered.row_mut(place).copy_from_slice(weight.row(*row));
                }
                turn(&mut gathered, rotations);
                for (place, row) in order.iter().enumerate() {
                    weight.row_mut(*row).copy_from_slice(gathered.row(place));
                }
            }
        } else {
            let first = first_of(outputs) / extent;
            let transposed: Vec<Matrix> =
                rotations[first..].iter().map(Matrix::transposed).collect();
            turn(weight, &transposed);
        }
        if let Some(rescale) = &self.rescale {
            let factors = rescale.read_f64()?.split_off(first_of(outputs));
            for (row, factor) in factors.into_iter().take(weight.rows).enumerate() {
                weight.row_mut(row).iter_mut().for_each(|value| *value *= factor);
            }
        }
        Ok(())
    }
}

/// Multiplies each run of rows by its matrix.
fn turn(weight: &mut Matrix, matrices: &[Matrix]) {
    let columns = weight.columns;
    let extent = matrices[0].rows;
    for (matrix, rows) in matrices.iter().zip(weight.values.chunks_exact_mut(extent * columns)) {
        let run = Matrix { rows: extent, columns, values: rows.to_vec() };
        rows.copy_from_slice(&matrix.times(&run).values);
    }
}

/// Which row goes to each place where those that are `half` apart come to lie side by side.
fn butterfly(rows: usize, half: usize) -> Vec<usize> {
    let mut order = vec![0; rows];
    for row in 0..rows {
        let (run, within) = (row / (2 * half), row % (2 * half));
        let place = run * 2 * half + 2 * (within % half) + within / half;
        order[place] = row;
    }
    order
}

/// Runs of inputs turned by orthogonal matrices: W·Rᵀ, or of an embedding W·R (OFT as PEFT has it).
#[derive(Debug, Clone)]
pub struct RotatedInputs {
    /// (n, b·(b − 1)/2): what stands above the diagonal of each block, row after row; of one block for
    /// all where they share it.
    pub elements: Tensor,
    /// b.
    pub extent: u64,
    /// Whether all blocks are the same.
    pub shared: bool,
    /// Whether the weight is an embedding's, whose rows are what is turned.
    pub of_embedding: bool,
    /// The bound on each block's norm, where there is one.
    pub bound: Option<f64>,
    /// How a rotation is made of a block.
    pub cayley: Cayley,
}

/// How an orthogonal matrix is made of a skew-symmetric Q.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Cayley {
    /// (I − Q)·(I + Q)⁻¹.
    Exact,
    /// So many terms of the series of (I + Q)·(I − Q)⁻¹, as PEFT 0.18 and later count them: I + 2Q +
    /// 2Q² + …, where the last power counts once.
    Series(u64),
}

impl Cayley {
    /// The coefficients of Q⁰, Q¹, … in the series.
    pub fn coefficients(terms: u64) -> Vec<f64> {
        match terms {
            0 | 1 => vec![1.0],
            2 => vec![1.0, 2.0],
            _ => {
                let last = (terms - 1).max(3) as usize;
                let mut coefficients = vec![2.0; last + 1];
                (coefficients[0], coefficients[last]) = (1.0, 1.0);
                coefficients
            }
        }
    }
}

impl RotatedInputs {
    /// What the weight's runs of columns are multiplied by.
    fn rotations(&self) -> Result<Vec<Matrix>> {
        let extent = self.extent as usize;
        let count = self.elements.shape[0] as f64;
        let values = self.elements.read_f64()?;
        let mut rotations = Vec::with_capacity(values.len() / self.elements.shape[1] as usize);
        for above in values.chunks_exact(self.elements.shape[1] as usize) {
            let mut skew = Matrix::zeros(extent, extent);
            let mut above = above.iter();
            for row in 0..extent {
                for column in row + 1..extent {
                    let value = *above.next().expect("their number was checked");
                    skew.values[row * extent + column] = value;
                    skew.values[column * extent + row] = -value;
                }
            }
            if let Some(bound) = self.bound {
                let norm = skew.values.iter().map(|value| value * value).sum::<f64>().sqrt();
                let allowed = bound / count.sqrt();
                if norm > allowed {
                    skew.values.iter_mut().for_each(|value| *value *= allowed / norm);
                }
            }
            let rotation = self.rotation(&skew).ok_or_else(|| {
                let message = format!("{} holds numbers that are not finite", self.elements.name);
                Error::adapter(self.elements.file().path(), message)
            })?;
            rotations.push(if self.of_embedding { rotation } else { rotation.transposed() });
        }
        Ok(rotations)
    }

    fn rotation(&self, skew: &Matrix) -> Option<Matrix> {
        let extent = skew.rows;
        let one = Matrix::identity(extent);
        let plus = |matrix: &Matrix, factor: f64, other: &Matrix| Matrix {
            values: (matrix.values.iter().zip(&other.values))
                .map(|(value, other)| value + factor * other)
                .collect(),
            ..*matrix
        };
        match self.cayley {
            // The two commute.
            Cayley::Exact => plus(&one, 1.0, skew).solve(&plus(&one, -1.0, skew)),
            Cayley::Series(terms) => {
                let (mut sum, mut power) = (Matrix::zeros(extent, extent), one);
                for (exponent, factor) in Cayley::coefficients(terms).into_iter().enumerate() {
                    if exponent > 0 {
                        power = power.times(skew);
                    }
                    sum = plus(&sum, factor, &power);
                }
                sum.values.iter().all(|value| value.is_finite()).then_some(sum)
            }
        }
    }
}

impl Delta for RotatedInputs {
    fn tensors(&self) -> Vec<(&'static str, &Tensor)> {
        vec![("the orthogonal blocks", &self.elements)]
    }

    /// 0, for nothing tells it.
    fn outputs(&self) -> u64 {
        0
    }

    /// 0 where blocks are shared, for then nothing tells it.
    fn input_shape(&self) -> Vec<u64> {
        vec![if self.shared { 0 } else { self.elements.shape[0] * self.extent }]
    }

    fn rank(&self) -> u64 {
        self.extent
    }

    fn form(&self) -> String {
        let Self { extent, shared, of_embedding, bound, cayley, .. } = self;
        format!("RotatedInputs({extent}, {shared}, {of_embedding}, {bound:?}, {cayley:?})")
    }

    fn pair(&self, _expert: Option<Expert>, _outputs: Option<&Range<u64>>) -> Result<Pair> {
        no_product(&self.elements, "an OFT adapter")
    }

    fn transform(&self) -> Option<&dyn Transform> {
        Some(self)
    }

    fn has_product(&self) -> bool {
        false
    }

    fn is_by_tokens(&self) -> bool {
        self.of_embedding
    }

    fn algorithm(&self) -> &'static str {
        "OFT"
    }
}

impl Transform for RotatedInputs {
    fn name(&self) -> &'static str {
        "OFT"
    }

    fn is_of_rows(&self, _outputs: &Range<u64>) -> bool {
        true
    }

    fn formula(&self) -> Formula<'_> {
        Formula::RotatedInputs(self)
    }

    fn apply(
        &self,
        weight: &mut Matrix,
        _scaling: f64,
        _outputs: Option<&Range<u64>>,
    ) -> Result<()> {
        let rotations = self.rotations()?;
        let extent = self.extent as usize;
        if !weight.columns.is_multiple_of(extent) {
            return Err(Error::adapter(
                self.elements.file().path(),
                format!(
                    "{} has blocks of {extent}, which the {} inputs of its weight are no multiple of",
                    self.elements.name, weight.columns
                ),
            ));
        }
        for row in 0..weight.rows {
            for (block, values) in weight.row_mut(row).chunks_exact_mut(extent).enumerate() {
                let own = Matrix { rows: 1, columns: extent, values: values.to_vec() };
                let rotation = &rotations[if self.shared { 0 } else { block }];
                values.copy_from_slice(&own.times(rotation).values);
            }
        }
        Ok(())
    }
}
