//! What is made of a whole weight, and is no sum with a product that the adapter holds: GLoRA, IA³,
//! orthogonal blocks, and DoRA whose magnitudes are the inputs'.

use std::ops::Range;
use std::sync::Arc;

use crate::adapter::delta::{Delta, Expert, Transform};
use crate::adapter::factors::Pair;
use crate::adapter::matrix::Matrix;
use crate::error::{Error, Result};
use crate::kernel::convert::widen_f64;
use crate::tensor::safetensors::Tensor;

/// That there is no product without the base's weight.
fn no_product<T>(tensor: &Tensor, what: &str) -> Result<T> {
    let message = format!(
        "{} is a part of {what}, of which only the base's weight makes an update",
        tensor.name
    );
    Err(Error::unsupported(tensor.file().path(), message))
}

/// W + s·(W·(a1·a2) + b1·b2), the first over the input channels (GLoRA; Chavan et al. 2023,
/// arXiv:2306.07967).
#[derive(Debug, Clone)]
pub struct Generalized {
    /// (in, r) and (r, in).
    pub of_weight: [Tensor; 2],
    /// (out, r) and (r, in, k…).
    pub added: [Tensor; 2],
}

impl Delta for Generalized {
    fn tensors(&self) -> Vec<(&'static str, &Tensor)> {
        let [a1, a2] = &self.of_weight;
        let [b1, b2] = &self.added;
        vec![
            ("the left factor on the weight", a1),
            ("the right factor on the weight", a2),
            ("the left factor beside it", b1),
            ("the right factor beside it", b2),
        ]
    }

    fn outputs(&self) -> u64 {
        self.added[0].shape[0]
    }

    fn input_shape(&self) -> Vec<u64> {
        self.added[1].shape[1..].to_vec()
    }

    fn rank(&self) -> u64 {
        self.added[1].shape[0]
    }

    fn form(&self) -> String {
        "Generalized".to_owned()
    }

    fn pair(&self, _expert: Option<Expert>, _outputs: Option<&Range<u64>>) -> Result<Pair> {
        no_product(&self.of_weight[0], "a GLoRA")
    }

    fn transform(&self) -> Option<&dyn Transform> {
        Some(self)
    }

    fn has_product(&self) -> bool {
        false
    }

    fn may_flatten_kernel(&self) -> bool {
        true
    }

    fn algorithm(&self) -> &'static str {
        "GLORA"
    }
}

impl Transform for Generalized {
    fn name(&self) -> &'static str {
        "GLoRA"
    }

    fn apply(&self, weight: &mut Matrix, scaling: f64) -> Result<()> {
        let [a1, a2] = &self.of_weight;
        let [b1, b2] = &self.added;
        let (a1, a2) = (Matrix::read(a1)?, Matrix::read(a2)?);
        let added = Matrix::read(b1)?.times(&Matrix::read(b2)?);
        let kernel = weight.columns / a1.rows;
        let mut middle = vec![0.0; a1.columns];
        for row in 0..weight.rows {
            let own = weight.row(row).to_vec();
            let target = weight.row_mut(row);
            for place in 0..kernel {
                middle.fill(0.0);
                for channel in 0..a1.rows {
                    let value = own[channel * kernel + place];
                    middle
                        .iter_mut()
                        .zip(a1.row(channel))
                        .for_each(|(to, from)| *to += value * from);
                }
                for channel in 0..a1.rows {
                    let terms =
                        middle.iter().enumerate().map(|(k, value)| value * a2.row(k)[channel]);
                    target[channel * kernel + place] += scaling * terms.sum::<f64>();
                }
            }
            target.iter_mut().zip(added.row(row)).for_each(|(to, from)| *to += scaling * from);
        }
        Ok(())
    }
}

/// W ∘ (1 + w), or W ∘ l, along the outputs or the inputs (IA³; Liu et al. 2022, arXiv:2205.05638).
#[derive(Debug, Clone)]
pub struct Scaled {
    /// One factor for each output or input.
    pub vector: Tensor,
    /// Whether it is one for each input.
    pub on_input: bool,
    /// Whether they are stored less 1, as LyCORIS does and PEFT does not.
    pub less_one: bool,
    /// Whether the layer's bias is scaled as well.
    pub with_bias: bool,
    /// The tensor that tells whether inputs are scaled, where one does.
    pub flag: Option<Tensor>,
}

impl Delta for Scaled {
    fn tensors(&self) -> Vec<(&'static str, &Tensor)> {
        let flag = self.flag.iter().map(|tensor| ("what tells whether inputs are scaled", tensor));
        std::iter::once(("the factors of IA3", &self.vector)).chain(flag).collect()
    }

    /// 0 where nothing tells it.
    fn outputs(&self) -> u64 {
        if self.on_input { 0 } else { self.vector.elements() }
    }

    fn input_shape(&self) -> Vec<u64> {
        vec![if self.on_input { self.vector.elements() } else { 0 }]
    }

    fn rank(&self) -> u64 {
        1
    }

    fn form(&self) -> String {
        let Self { on_input, less_one, with_bias, .. } = self;
        format!("Scaled({on_input}, {less_one}, {with_bias})")
    }

    fn pair(&self, _expert: Option<Expert>, _outputs: Option<&Range<u64>>) -> Result<Pair> {
        no_product(&self.vector, "an IA3 adapter")
    }

    fn transform(&self) -> Option<&dyn Transform> {
        Some(self)
    }

    fn has_product(&self) -> bool {
        false
    }

    fn algorithm(&self) -> &'static str {
        "IA3"
    }
}

impl Transform for Scaled {
    fn name(&self) -> &'static str {
        "IA3"
    }

    fn apply(&self, weight: &mut Matrix, _scaling: f64) -> Result<()> {
        let mut factors = self.vector.read_f64()?;
        if self.less_one {
            factors.iter_mut().for_each(|factor| *factor += 1.0);
        }
        let kernel = weight.columns / factors.len().max(1);
        for row in 0..weight.rows {
            let values = weight.row_mut(row);
            if self.on_input {
                for (factor, values) in factors.iter().zip(values.chunks_exact_mut(kernel.max(1))) {
                    values.iter_mut().for_each(|value| *value *= factor);
                }
            } else {
                values.iter_mut().for_each(|value| *value *= factors[row]);
            }
        }
        Ok(())
    }

    fn changes_bias(&self) -> bool {
        self.with_bias
    }
}

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

    fn apply(&self, weight: &mut Matrix, _scaling: f64) -> Result<()> {
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
            let transposed: Vec<Matrix> = rotations.iter().map(Matrix::transposed).collect();
            turn(weight, &transposed);
        }
        if let Some(rescale) = &self.rescale {
            for (row, factor) in rescale.read_f64()?.into_iter().enumerate() {
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

/// DoRA whose magnitudes are the inputs': m/‖V‖ ∘ V with V = W + s·B·A, a norm for each input over
/// outputs and kernel.
#[derive(Debug, Clone)]
pub struct RescaledInputs {
    /// What is added to the weight.
    pub delta: Arc<dyn Delta>,
    /// One for each input channel.
    pub magnitude: Tensor,
}

impl Delta for RescaledInputs {
    fn tensors(&self) -> Vec<(&'static str, &Tensor)> {
        let mut tensors = self.delta.tensors();
        tensors.push(("DoRA's magnitude of the inputs", &self.magnitude));
        tensors
    }

    fn outputs(&self) -> u64 {
        self.delta.outputs()
    }

    fn input_shape(&self) -> Vec<u64> {
        self.delta.input_shape()
    }

    fn rank(&self) -> u64 {
        self.delta.rank()
    }

    fn form(&self) -> String {
        format!("RescaledInputs({})", self.delta.form())
    }

    fn pair(&self, expert: Option<Expert>, outputs: Option<&Range<u64>>) -> Result<Pair> {
        self.delta.pair(expert, outputs)
    }

    fn kronecker(&self) -> Result<Option<[Pair; 2]>> {
        self.delta.kronecker()
    }

    fn is_expanded(&self) -> bool {
        self.delta.is_expanded()
    }

    fn may_flatten_kernel(&self) -> bool {
        self.delta.may_flatten_kernel()
    }

    fn transform(&self) -> Option<&dyn Transform> {
        Some(self)
    }

    fn algorithm(&self) -> &'static str {
        self.delta.algorithm()
    }

    fn magnitude(&self) -> Option<&Tensor> {
        Some(&self.magnitude)
    }
}

impl Transform for RescaledInputs {
    fn name(&self) -> &'static str {
        "DoRA of the inputs"
    }

    fn apply(&self, weight: &mut Matrix, scaling: f64) -> Result<()> {
        let pair = self.delta.pair(None, None)?;
        let b = Matrix {
            rows: pair.outputs,
            columns: pair.rank,
            values: widen_f64(&pair.b_dtype, &pair.b),
        };
        let a = Matrix {
            rows: pair.rank,
            columns: pair.inputs,
            values: widen_f64(&pair.a_dtype, &pair.a),
        };
        let product = b.times(&a);
        weight.values.iter_mut().zip(&product.values).for_each(|(to, from)| *to += scaling * from);
        let magnitudes = self.magnitude.read_f64()?;
        let kernel = weight.columns / magnitudes.len().max(1);
        let mut squares = vec![0.0; magnitudes.len()];
        for row in 0..weight.rows {
            for (square, values) in squares.iter_mut().zip(weight.row(row).chunks_exact(kernel)) {
                *square += values.iter().map(|value| value * value).sum::<f64>();
            }
        }
        let gain = |(magnitude, square): (f64, f64)| match square {
            // Nothing to be rescaled.
            0.0 => 0.0,
            square => magnitude / square.sqrt(),
        };
        let gains: Vec<f64> = magnitudes.into_iter().zip(squares).map(gain).collect();
        for row in 0..weight.rows {
            for (gain, values) in gains.iter().zip(weight.row_mut(row).chunks_exact_mut(kernel)) {
                values.iter_mut().for_each(|value| *value *= gain);
            }
        }
        Ok(())
    }
}
