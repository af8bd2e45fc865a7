//! What is made of a whole weight, and is no sum with a product that the adapter holds: GLoRA, IA³, and
//! DoRA whose magnitudes are the inputs'.

use std::ops::Range;
use std::sync::Arc;

use crate::adapter::delta::{Delta, Expert, Formula, Transform};
use crate::adapter::factors::Pair;
use crate::adapter::matrix::Matrix;
use crate::error::{Error, Result};
use crate::kernel::convert::widen_f64;
use crate::tensor::safetensors::Tensor;

/// That there is no product without the base's weight.
pub(super) fn no_product<T>(tensor: &Tensor, what: &str) -> Result<T> {
    let message = format!(
        "{} is a part of {what}, of which only the base's weight makes an update",
        tensor.name
    );
    Err(Error::unsupported(tensor.file().path(), message))
}

/// The first of some rows.
pub(super) fn first_of(outputs: Option<&Range<u64>>) -> usize {
    outputs.map_or(0, |outputs| outputs.start as usize)
}

/// W + s·(W·(a1·a2) + b1·b2), the first over the input channels (GLoRA; Chavan et al. 2023,
/// arXiv:2306.07967).
#[derive(Debug, Clone)]
pub struct Generalized {
    /// (in, r) and (r, in).
    pub of_weight: [Tensor; 2],
    /// (out, r) and (r, in, k…).
    pub added: [Tensor; 2],
    /// What lies between these two in Tucker's form, (r, r, k…); the second is then (r, in).
    pub core: Option<Tensor>,
}

impl Delta for Generalized {
    fn tensors(&self) -> Vec<(&'static str, &Tensor)> {
        let [a1, a2] = &self.of_weight;
        let [b1, b2] = &self.added;
        let mut tensors = vec![
            ("the left factor on the weight", a1),
            ("the right factor on the weight", a2),
            ("the left factor beside it", b1),
            ("the right factor beside it", b2),
        ];
        tensors.extend(self.core.iter().map(|core| ("the core between these", core)));
        tensors
    }

    fn outputs(&self) -> u64 {
        self.added[0].shape[0]
    }

    fn input_shape(&self) -> Vec<u64> {
        match &self.core {
            Some(core) => [&self.added[1].shape[1..2], &core.shape[2..]].concat(),
            None => self.added[1].shape[1..].to_vec(),
        }
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

    fn is_of_rows(&self, _outputs: &Range<u64>) -> bool {
        true
    }

    fn formula(&self) -> Formula<'_> {
        Formula::Generalized(self)
    }

    fn apply(&self, weight: &mut Matrix, scaling: f64, outputs: Option<&Range<u64>>) -> Result<()> {
        let [a1, a2] = &self.of_weight;
        let [b1, b2] = &self.added;
        let (a1, a2) = (Matrix::read(a1)?, Matrix::read(a2)?);
        let right = match &self.core {
            Some(core) => Matrix::contract(&Matrix::read(core)?, &Matrix::read(b2)?),
            None => Matrix::read(b2)?,
        };
        let added = Matrix::read(b1)?.times(&right);
        let first = first_of(outputs);
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
            target
                .iter_mut()
                .zip(added.row(first + row))
                .for_each(|(to, from)| *to += scaling * from);
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

    fn is_of_rows(&self, _outputs: &Range<u64>) -> bool {
        true
    }

    fn formula(&self) -> Formula<'_> {
        Formula::Scaled(self)
    }

    fn apply(
        &self,
        weight: &mut Matrix,
        _scaling: f64,
        outputs: Option<&Range<u64>>,
    ) -> Result<()> {
        let mut factors = self.vector.read_f64()?;
        if self.less_one {
            factors.iter_mut().for_each(|factor| *factor += 1.0);
        }
        let first = first_of(outputs);
        let kernel = weight.columns / factors.len().max(1);
        for row in 0..weight.rows {
            let values = weight.row_mut(row);
            if self.on_input {
                for (factor, values) in factors.iter().zip(values.chunks_exact_mut(kernel.max(1))) {
                    values.iter_mut().for_each(|value| *value *= factor);
                }
            } else {
                values.iter_mut().for_each(|value| *value *= factors[first + row]);
            }
        }
        Ok(())
    }

    fn changes_bias(&self) -> bool {
        self.with_bias
    }
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

    /// The norms run over all of them.
    fn is_of_rows(&self, outputs: &Range<u64>) -> bool {
        *outputs == (0..self.outputs())
    }

    fn formula(&self) -> Formula<'_> {
        Formula::RescaledInputs(self)
    }

    fn apply(
        &self,
        weight: &mut Matrix,
        scaling: f64,
        _outputs: Option<&Range<u64>>,
    ) -> Result<()> {
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
