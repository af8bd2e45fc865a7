//! The tensors of one module, and the modules that they make.

use std::path::Path;
use std::sync::Arc;

use super::algorithms::{HasScale, Made, check_rank, lacks};
use super::{DefaultScale, Part, ScaleRule};
use crate::adapter::deltas::{Difference, RescaledInputs};
use crate::adapter::{Delta, LayerKind, Module};
use crate::error::{Error, Result, with_article};
use crate::limits;
use crate::tensor::dtype::Dtype;
use crate::tensor::safetensors::Tensor;

/// The tensors of one module, as they are found.
#[derive(Debug, Default)]
pub struct ModuleParts {
    parts: Vec<(Part, Tensor)>,
    /// What messages call the module by: one of its factors.
    named_by: Option<Tensor>,
}

/// What a module adds, by the parts that make it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Algorithm {
    LowRank,
    Hadamard,
    Kronecker,
    Difference,
    Norm,
    GLora,
    Ia3,
    Orthogonal,
}

impl Algorithm {
    fn of(part: Part) -> Option<Self> {
        Some(match part {
            Part::Down | Part::Up | Part::Mid | Part::UpBias => Self::LowRank,
            Part::Hadamard(_) => Self::Hadamard,
            Part::Kronecker(_) => Self::Kronecker,
            Part::Difference => Self::Difference,
            Part::NormDifference | Part::NormBiasDifference => Self::Norm,
            Part::GLora(_) => Self::GLora,
            Part::OnInput | Part::Weight | Part::Ia3 => Self::Ia3,
            Part::OrthogonalBlocks
            | Part::Rescale
            | Part::OrthogonalElements
            | Part::EmbeddingElements => Self::Orthogonal,
            _ => return None,
        })
    }

    fn name(self) -> &'static str {
        match self {
            Self::LowRank => "LoRA",
            Self::Hadamard => "LoHa",
            Self::Kronecker => "LoKr",
            Self::Difference => "full difference",
            Self::Norm => "norm",
            Self::GLora => "GLoRA",
            Self::Ia3 => "IA3",
            Self::Orthogonal => "OFT",
        }
    }
}

impl ModuleParts {
    /// Takes in one more tensor.
    ///
    /// # Errors
    /// [`Error::Adapter`] if that part is there already, under another spelling.
    pub fn add(&mut self, part: Part, tensor: Tensor) -> Result<()> {
        if let Some(other) = self.get(part).filter(|_| !matches!(part, Part::Refused(_))) {
            let (path, name) = (tensor.file().path().to_path_buf(), &tensor.name);
            let other = &other.name;
            let problem = format!("has both {other} and {name}, which are one part of one module");
            return Err(Error::adapter(path, problem));
        }
        self.parts.push((part, tensor));
        Ok(())
    }

    /// The tensor that plays that part.
    pub fn get(&self, part: Part) -> Option<&Tensor> {
        self.parts.iter().find(|(own, _)| *own == part).map(|(_, tensor)| tensor)
    }

    /// All tensors with their parts, as they were found.
    pub fn tensors(&self) -> &[(Part, Tensor)] {
        &self.parts
    }

    /// The tensors that are there and count for nothing: an alpha beside a scale, or beside what has
    /// no scale.
    pub fn unused(&self) -> impl Iterator<Item = &Tensor> {
        let is_without_scale = |(part, _): &(Part, Tensor)| {
            matches!(
                Algorithm::of(*part),
                Some(Algorithm::Difference | Algorithm::Norm | Algorithm::Ia3)
            )
        };
        let is_idle = self.get(Part::Scale).is_some() || self.parts.iter().any(is_without_scale);
        self.get(Part::Alpha).filter(|_| is_idle).into_iter()
    }

    pub(super) fn take(&mut self, part: Part) -> Option<Tensor> {
        let position = self.parts.iter().position(|(own, _)| *own == part)?;
        Some(self.parts.swap_remove(position).1)
    }

    /// The modules that they make: that of the weight and that of the bias, as far as there are parts
    /// of each. `key` is the module's name in the file and `path` its path in the model.
    ///
    /// # Errors
    /// [`Error::Adapter`] if they make none, [`Error::Unsupported`] if it cannot be read,
    /// [`Error::Io`].
    pub fn module(mut self, key: &str, path: &str, rule: &ScaleRule) -> Result<Vec<Module>> {
        let Some((_, first)) = self.parts.first() else { return Ok(Vec::new()) };
        let file = first.file().path().to_path_buf();
        let broken = |message: String| Error::adapter(&file, message);
        for (part, tensor) in &self.parts {
            if let Part::Refused(what) = part {
                let message = format!("holds {}, {what}; it cannot be read", tensor.name);
                return Err(Error::unsupported(&file, message));
            }
            if !tensor.dtype.is_mergeable() && !matches!(part, Part::Alpha | Part::OnInput) {
                return Err(broken(format!(
                    "tensor {} has the type {}; a factor is of a floating-point type",
                    tensor.name, tensor.dtype
                )));
            }
        }
        let algorithm = self.algorithm(key).map_err(broken)?;
        let is_factor = |(part, _): &&(Part, Tensor)| Algorithm::of(*part).is_some();
        self.named_by = self.parts.iter().find(is_factor).map(|(_, tensor)| tensor.clone());
        let bias = self.take(Part::BiasDifference).or_else(|| self.take(Part::NormBiasDifference));
        let mut modules = Vec::new();
        if let Some(algorithm) = algorithm {
            modules.extend(self.weight(algorithm, key, path, rule)?);
        } else if let Some((_, left)) = self.parts.first() {
            return Err(broken(format!("has {} but not its factors", left.name)));
        }
        if let Some(bias) = bias {
            let module = difference(bias, &format!("{key}.bias"), path, true).map_err(broken)?;
            modules.push(module);
        }
        Ok(modules)
    }

    /// The module of the weight, where there are parts of one.
    fn weight(
        mut self,
        algorithm: Algorithm,
        key: &str,
        path: &str,
        rule: &ScaleRule,
    ) -> Result<Option<Module>> {
        let file = self.parts.first().map(|(_, tensor)| tensor.file().path().to_path_buf());
        let broken =
            |message: String| Error::adapter(file.as_deref().unwrap_or(Path::new("")), message);
        let magnitude = self.take(Part::Magnitude).map(|magnitude| (magnitude, false));
        let magnitude = magnitude
            .or_else(|| self.take(Part::OutputMagnitude).map(|magnitude| (magnitude, true)));
        if let Some((magnitude, _)) = &magnitude
            && !matches!(algorithm, Algorithm::LowRank | Algorithm::Hadamard | Algorithm::Kronecker)
        {
            let what = with_article(algorithm.name());
            let problem = format!("has {} beside {what}, which has no magnitudes", magnitude.name);
            return Err(broken(problem));
        }
        let made = match algorithm {
            Algorithm::LowRank => self.low_rank()?,
            Algorithm::Hadamard => self.hadamard()?,
            Algorithm::Kronecker => self.kronecker()?,
            Algorithm::GLora => self.generalized()?,
            Algorithm::Ia3 => self.scaled()?,
            Algorithm::Orthogonal => self.orthogonal()?,
            Algorithm::Difference | Algorithm::Norm => {
                let difference = self.take(Part::Difference);
                let Some(tensor) = difference.or_else(|| self.take(Part::NormDifference)) else {
                    return Ok(None);
                };
                return self::difference(tensor, key, path, false).map(Some).map_err(broken);
            }
        };
        let Made { delta, rank, kind, has_scale } = made;
        if expanded(&*delta).is_none_or(|elements| elements > limits::EXPANDED) {
            return Err(broken(format!(
                "has factors of {key} that expand to more than {} elements, which no weight has",
                limits::EXPANDED
            )));
        }
        let (alpha, scaling) = match has_scale {
            HasScale::Always => self.scale(rank, rule)?,
            HasScale::InPeft if rule.scales_whole_factors => self.scale(rank, rule)?,
            HasScale::InPeft => {
                self.get(Part::Alpha)
                    .map_or(Ok(()), |alpha| check_alpha(alpha, any_number(alpha)?))?;
                (rank as f64, 1.0)
            }
            HasScale::Never => (rank as f64, 1.0),
        };
        let bias = self.take(Part::UpBias);
        if let Some(bias) = bias.as_ref().filter(|bias| bias.elements() != delta.outputs()) {
            return Err(broken(format!(
                "{} has shape {:?} but its module has {} outputs",
                bias.name,
                bias.shape,
                delta.outputs()
            )));
        }
        let (delta, magnitude) = match magnitude {
            None => (delta, None),
            Some((magnitude, is_of_outputs)) => {
                let axis = if is_of_outputs {
                    (magnitude.elements() == delta.outputs()).then_some(Axis::Outputs)
                } else {
                    axis(&magnitude, &*delta)
                };
                match axis {
                    Some(Axis::Outputs) => (delta, Some(magnitude)),
                    Some(Axis::Inputs) => {
                        let delta: Arc<dyn Delta> = Arc::new(RescaledInputs { delta, magnitude });
                        (delta, None)
                    }
                    None => {
                        return Err(broken(format!(
                            "{} has shape {:?}, which is neither the outputs' of its module, {}, nor \
                             its inputs', {:?}",
                            magnitude.name,
                            magnitude.shape,
                            delta.outputs(),
                            delta.input_shape()
                        )));
                    }
                }
            }
        };
        let scale = self.take(Part::Scale);
        let alpha_tensor = self.take(Part::Alpha).filter(|_| has_scale != HasScale::Never);
        Ok(Some(Module {
            key: key.to_owned(),
            path: path.to_owned(),
            parameters: Vec::new(),
            kind,
            delta,
            scale: scale.or(alpha_tensor),
            magnitude,
            bias,
            rank,
            alpha,
            scaling,
        }))
    }

    /// The algorithm by the parts that are there, where there is more than a bias; or in words why it
    /// is none.
    fn algorithm(&self, key: &str) -> Result<Option<Algorithm>, String> {
        let known = || {
            let of_part = |(part, tensor): &(Part, Tensor)| {
                Some((Algorithm::of(*part)?, tensor.name.clone()))
            };
            self.parts.iter().filter_map(of_part)
        };
        let Some((algorithm, name)) = known().next() else { return Ok(None) };
        match known().find(|(other, _)| *other != algorithm) {
            None => Ok(Some(algorithm)),
            Some((other, second)) => Err(format!(
                "has {name}, a part of {}, and {second}, a part of {}, for one module, {key}; keep the \
                 one that was meant",
                with_article(algorithm.name()),
                with_article(other.name())
            )),
        }
    }

    /// A part that others need.
    pub(super) fn need(&mut self, part: Part, what: &str) -> Result<Tensor> {
        if let Some(tensor) = self.take(part) {
            return Ok(tensor);
        }
        Err(lacks(self.named_by.as_ref().expect("set before any part is taken"), what))
    }
    /// The alpha and the scale of a module whose stored rank is this.
    fn scale(&self, rank: u64, rule: &ScaleRule) -> Result<(f64, f64)> {
        let count = rank as f64;
        if let Some(scale) = self.get(Part::Scale) {
            let scaling = number(scale)?;
            return Ok((scaling * count, scaling));
        }
        let Some(alpha) = self.get(Part::Alpha) else {
            return Ok(match rule.default {
                DefaultScale::One => (count, 1.0),
                DefaultScale::Alpha(alpha) => (alpha, alpha / count),
                DefaultScale::Factor { scaling, alpha } => (alpha, scaling),
            });
        };
        let value = number(alpha)?;
        check_alpha(alpha, value)?;
        Ok((value, value / count))
    }
}

/// Refuses an alpha of zero.
fn check_alpha(alpha: &Tensor, value: f64) -> Result<()> {
    if value != 0.0 {
        return Ok(());
    }
    Err(Error::adapter(
        alpha.file().path(),
        format!(
            "{} is 0, which some programs read as the rank and others as no update; write the alpha \
             that was meant",
            alpha.name
        ),
    ))
}

/// What magnitudes belong to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Axis {
    Outputs,
    Inputs,
}

/// What a magnitude belongs to by its shape: where both would do, by the position of its extent.
fn axis(magnitude: &Tensor, delta: &dyn Delta) -> Option<Axis> {
    let count = magnitude.elements();
    let is_of_outputs = count == delta.outputs();
    let shape = delta.input_shape();
    let is_of_inputs = shape[0] == count
        || delta.may_flatten_kernel() && count > 0 && shape[0].is_multiple_of(count);
    let is_second = magnitude.shape.len() > 1 && magnitude.shape[1] == count && count > 1;
    match (is_of_outputs, is_of_inputs, is_second) {
        (true, false, _) | (true, true, false) => Some(Axis::Outputs),
        (_, true, true) => Some(Axis::Inputs),
        _ => None,
    }
}

/// The elements of the factors of its product; `None` where they are too many to be counted.
fn expanded(delta: &dyn Delta) -> Option<u64> {
    if !delta.is_expanded() {
        return Some(0);
    }
    let inputs = delta.input_shape().iter().try_fold(1u64, |all, one| all.checked_mul(*one))?;
    delta.outputs().checked_add(inputs)?.checked_mul(delta.rank())
}

/// The module of a full difference.
fn difference(tensor: Tensor, key: &str, path: &str, is_bias: bool) -> Result<Module, String> {
    let kind = match (is_bias, tensor.shape.len()) {
        (true, 1) => LayerKind::Bias,
        (false, 1) => LayerKind::Norm,
        (false, 2) => LayerKind::Linear,
        (false, 3..) => LayerKind::Convolution,
        _ => {
            return Err(format!("{} has shape {:?}, which no bias has", tensor.name, tensor.shape));
        }
    };
    let delta = Difference { tensor };
    let rank = delta.rank();
    check_rank(&delta.tensor, rank)?;
    Ok(Module {
        key: key.to_owned(),
        path: path.to_owned(),
        parameters: Vec::new(),
        kind,
        delta: Arc::new(delta),
        scale: None,
        magnitude: None,
        bias: None,
        rank,
        alpha: rank as f64,
        scaling: 1.0,
    })
}

/// The finite number that a tensor of one element holds.
///
/// # Errors
/// [`Error::Adapter`] if it is none, [`Error::Io`].
pub(super) fn number(tensor: &Tensor) -> Result<f64> {
    let broken = |message: String| Error::adapter(tensor.file().path(), message);
    if tensor.elements() != 1 {
        return Err(broken(format!(
            "{} has shape {:?}; it is one number",
            tensor.name, tensor.shape
        )));
    }
    let value = any_number(tensor)?;
    if !value.is_finite() {
        return Err(broken(format!("{} is {value}; it is a finite number", tensor.name)));
    }
    Ok(value)
}

/// The number that a tensor of one element holds, of whatever type.
fn any_number(tensor: &Tensor) -> Result<f64> {
    let Dtype::Other(name) = &tensor.dtype else { return Ok(tensor.read_f64()?[0]) };
    let bytes = tensor.read()?;
    let integer = match (&**name, bytes.as_slice()) {
        ("I64", &[a, b, c, d, e, f, g, h]) => i64::from_le_bytes([a, b, c, d, e, f, g, h]) as f64,
        ("I32", &[a, b, c, d]) => f64::from(i32::from_le_bytes([a, b, c, d])),
        ("I16", &[a, b]) => f64::from(i16::from_le_bytes([a, b])),
        ("I8", &[a]) => f64::from(a.cast_signed()),
        ("U8" | "BOOL", &[a]) => f64::from(a),
        _ => {
            return Err(Error::adapter(
                tensor.file().path(),
                format!("tensor {} has the type {name}, which is no number's", tensor.name),
            ));
        }
    };
    Ok(integer)
}
