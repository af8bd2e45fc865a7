//! The parts of a module in files of one tensor a part, as trainers of image models write them: which
//! part a tensor plays by the end of its name, and the modules that the parts of one make.

use std::sync::Arc;

use crate::adapter::deltas::LowRank;
use crate::adapter::{LayerKind, Module, foreign};
use crate::error::{Error, Result};
use crate::limits;
use crate::tensor::dtype::Dtype;
use crate::tensor::safetensors::Tensor;

/// The role of a tensor in its module, whatever trainers call it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Part {
    /// The first factor of a low-rank product, (r, in, k…).
    Down,
    /// The second, (out, r, 1…).
    Up,
    /// What lies between them in Tucker's form, (r, r, k…).
    Mid,
    /// The bias of the second factor.
    UpBias,
    /// The alpha of the scale alpha / r; for orthogonal blocks their constraint.
    Alpha,
    /// The scale itself, which counts more than an alpha.
    Scale,
    /// DoRA's magnitudes, of the outputs or the inputs by their shape.
    Magnitude,
    /// DoRA's magnitudes of the outputs, whatever their shape.
    OutputMagnitude,
    /// A factor of a Hadamard product (LoHa).
    Hadamard(Hadamard),
    /// A factor of a Kronecker product (LoKr).
    Kronecker(Kronecker),
    /// All that is added to the weight.
    Difference,
    /// All that is added to the bias.
    BiasDifference,
    /// All that is added to the weight of a norm.
    NormDifference,
    /// All that is added to the bias of a norm.
    NormBiasDifference,
    /// A factor of GLoRA.
    GLora(GLora),
    /// LyCORIS's flag of IA³: whether inputs are scaled, and not outputs.
    OnInput,
    /// A tensor under the name of the weight itself: IA³'s vector where [`Part::OnInput`] stands beside
    /// it. A format looks for it alone after all others.
    Weight,
    /// PEFT's vector of IA³.
    Ia3,
    /// The blocks of an orthogonal matrix, or of several (Diag-OFT, BOFT).
    OrthogonalBlocks,
    /// The factor on each output beside them.
    Rescale,
    /// What cannot be read, and in words what it is.
    Refused(&'static str),
}

/// The factors of (w1_a·w1_b) ∘ (w2_a·w2_b), and the cores of Tucker's form.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[allow(missing_docs, reason = "the names of the formula")]
pub enum Hadamard {
    W1A,
    W1B,
    W2A,
    W2B,
    T1,
    T2,
}

/// The factors of w1 ⊗ w2, either whole or as a product, and the core of Tucker's form.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[allow(missing_docs, reason = "the names of the formula")]
pub enum Kronecker {
    W1,
    W1A,
    W1B,
    W2,
    W2A,
    W2B,
    T2,
}

/// The factors of W·(a1·a2) + b1·b2.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[allow(missing_docs, reason = "the names of the formula")]
pub enum GLora {
    A1,
    A2,
    B1,
    B2,
    BM,
}

/// The programs that end a tensor's name so.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Spelling {
    /// kohya's scripts and all that follow them: `.lora_down.weight`.
    Kohya,
    /// LyCORIS, for what is no plain product: `.hada_w1_a`.
    Lycoris,
    /// PEFT and diffusers: `.lora_A.weight`.
    Peft,
    /// The same with the adapter's name: `.lora_A.default.weight`.
    PeftDefault,
    /// The same without an ending: `.lora_A`.
    PeftBare,
    /// Early releases of diffusers: `.lora.down.weight`.
    LoraLayer,
    /// The same for text encoders: `.lora_linear_layer.down.weight`.
    LoraLinearLayer,
    /// The same for attention processors: `_lora.down.weight`.
    AttentionProcessor,
    /// An ending that several of them write.
    Shared,
}

const T_LORA: &str = "a part of a T-LoRA, whose update needs the factors that it began with, which \
                      come from a decomposition of the base";
const SPARSE: &str = "a sparse part that early releases of LyCORIS wrote beside the factors";
const FORK: &str = "of a fork that changes how magnitudes are applied";
const OFT: &str = "a part of an OFT as PEFT and OneTrainer write it";
const WHOLE: &str = "a parameter that replaces the base's, or widens it, as Flux's control adapters \
                     have it";

/// Every ending with the part and the spelling; the longest that fits counts.
const ENDINGS: &[(&str, Part, Spelling)] = &[
    (".lora_down.weight", Part::Down, Spelling::Kohya),
    (".lora_up.weight", Part::Up, Spelling::Kohya),
    (".lora_mid.weight", Part::Mid, Spelling::Kohya),
    (".lora_up.bias", Part::UpBias, Spelling::Kohya),
    (".lora_A.weight", Part::Down, Spelling::Peft),
    (".lora_B.weight", Part::Up, Spelling::Peft),
    (".lora_B.bias", Part::UpBias, Spelling::Peft),
    (".lora_A.default.weight", Part::Down, Spelling::PeftDefault),
    (".lora_B.default.weight", Part::Up, Spelling::PeftDefault),
    (".lora_B.default.bias", Part::UpBias, Spelling::PeftDefault),
    (".lora_A", Part::Down, Spelling::PeftBare),
    (".lora_B", Part::Up, Spelling::PeftBare),
    (".lora.down.weight", Part::Down, Spelling::LoraLayer),
    (".lora.up.weight", Part::Up, Spelling::LoraLayer),
    (".lora_linear_layer.down.weight", Part::Down, Spelling::LoraLinearLayer),
    (".lora_linear_layer.up.weight", Part::Up, Spelling::LoraLinearLayer),
    ("_lora.down.weight", Part::Down, Spelling::AttentionProcessor),
    ("_lora.up.weight", Part::Up, Spelling::AttentionProcessor),
    (".hada_w1_a", Part::Hadamard(Hadamard::W1A), Spelling::Lycoris),
    (".hada_w1_b", Part::Hadamard(Hadamard::W1B), Spelling::Lycoris),
    (".hada_w2_a", Part::Hadamard(Hadamard::W2A), Spelling::Lycoris),
    (".hada_w2_b", Part::Hadamard(Hadamard::W2B), Spelling::Lycoris),
    (".hada_t1", Part::Hadamard(Hadamard::T1), Spelling::Lycoris),
    (".hada_t2", Part::Hadamard(Hadamard::T2), Spelling::Lycoris),
    (".lokr_w1", Part::Kronecker(Kronecker::W1), Spelling::Lycoris),
    (".lokr_w1_a", Part::Kronecker(Kronecker::W1A), Spelling::Lycoris),
    (".lokr_w1_b", Part::Kronecker(Kronecker::W1B), Spelling::Lycoris),
    (".lokr_w2", Part::Kronecker(Kronecker::W2), Spelling::Lycoris),
    (".lokr_w2_a", Part::Kronecker(Kronecker::W2A), Spelling::Lycoris),
    (".lokr_w2_b", Part::Kronecker(Kronecker::W2B), Spelling::Lycoris),
    (".lokr_t2", Part::Kronecker(Kronecker::T2), Spelling::Lycoris),
    (".diff", Part::Difference, Spelling::Shared),
    (".diff_b", Part::BiasDifference, Spelling::Shared),
    (".w_norm", Part::NormDifference, Spelling::Lycoris),
    (".b_norm", Part::NormBiasDifference, Spelling::Lycoris),
    (".a1.weight", Part::GLora(GLora::A1), Spelling::Lycoris),
    (".a2.weight", Part::GLora(GLora::A2), Spelling::Lycoris),
    (".b1.weight", Part::GLora(GLora::B1), Spelling::Lycoris),
    (".b2.weight", Part::GLora(GLora::B2), Spelling::Lycoris),
    (".bm.weight", Part::GLora(GLora::BM), Spelling::Lycoris),
    (".on_input", Part::OnInput, Spelling::Lycoris),
    (".weight", Part::Weight, Spelling::Shared),
    (".ia3_l", Part::Ia3, Spelling::Peft),
    (".oft_blocks", Part::OrthogonalBlocks, Spelling::Lycoris),
    (".rescale", Part::Rescale, Spelling::Lycoris),
    (".alpha", Part::Alpha, Spelling::Shared),
    (".scale", Part::Scale, Spelling::Shared),
    (".dora_scale", Part::Magnitude, Spelling::Shared),
    (".magnitude", Part::Magnitude, Spelling::Shared),
    (".lora_magnitude_vector", Part::OutputMagnitude, Spelling::Peft),
    (".lora_magnitude_vector.weight", Part::OutputMagnitude, Spelling::Peft),
    (".lora_magnitude_vector.default.weight", Part::OutputMagnitude, Spelling::PeftDefault),
    (".q_layer.weight", Part::Refused(T_LORA), Spelling::Lycoris),
    (".p_layer.weight", Part::Refused(T_LORA), Spelling::Lycoris),
    (".lambda_layer", Part::Refused(T_LORA), Spelling::Lycoris),
    (".bias_indices", Part::Refused(SPARSE), Spelling::Lycoris),
    (".bias_values", Part::Refused(SPARSE), Spelling::Lycoris),
    (".bias_size", Part::Refused(SPARSE), Spelling::Lycoris),
    (".wd_for_diff", Part::Refused(FORK), Spelling::Lycoris),
    (".bora_scale_r", Part::Refused(FORK), Spelling::Lycoris),
    (".bora_scale_c", Part::Refused(FORK), Spelling::Lycoris),
    (".oft_R.weight", Part::Refused(OFT), Spelling::Peft),
    (".oft_diag", Part::Refused(OFT), Spelling::Lycoris),
    (".set_weight", Part::Refused(WHOLE), Spelling::Shared),
    (".reshape_weight", Part::Refused(WHOLE), Spelling::Shared),
];

/// A key's module, the part that the tensor plays in it, and who writes it so.
pub fn split(key: &str) -> Option<(&str, Part, Spelling)> {
    let found = ENDINGS.iter().filter_map(|(ending, part, spelling)| {
        let module = key.strip_suffix(ending).filter(|module| !module.is_empty())?;
        Some((module, *part, *spelling))
    });
    found.min_by_key(|(module, ..)| module.len())
}

/// Where a module's scale comes from.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct ScaleRule {
    /// What it is where the file has no alpha for the module.
    pub default: DefaultScale,
    /// Whether it counts even for a Kronecker product whose factors are both stored whole, as in PEFT.
    pub scales_whole_factors: bool,
}

/// The scale of a module without an alpha of its own.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub enum DefaultScale {
    /// It is 1.
    #[default]
    One,
    /// It is this over the rank that is stored.
    Alpha(f64),
    /// It is this, which was made of that alpha.
    Factor {
        /// The scale.
        scaling: f64,
        /// The alpha.
        alpha: f64,
    },
}

/// The tensors of one module, as they are found.
#[derive(Debug, Default)]
pub struct ModuleParts {
    parts: Vec<(Part, Tensor)>,
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
            Part::OrthogonalBlocks | Part::Rescale => Self::Orthogonal,
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
        if let Some(other) = self.get(part) {
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

    /// The tensors that are there and count for nothing: an alpha beside a scale.
    pub fn unused(&self) -> impl Iterator<Item = &Tensor> {
        self.get(Part::Alpha).filter(|_| self.get(Part::Scale).is_some()).into_iter()
    }

    fn take(&mut self, part: Part) -> Option<Tensor> {
        let position = self.parts.iter().position(|(own, _)| *own == part)?;
        Some(self.parts.swap_remove(position).1)
    }

    /// The modules that they make: that of the weight and that of the bias, as far as there are parts
    /// of each. `key` is the module's name in the file and `path` its path in the model.
    ///
    /// # Errors
    /// [`Error::Adapter`] if they make none, [`Error::Unsupported`] if it cannot be read,
    /// [`Error::Io`].
    pub fn module(self, key: &str, path: &str, rule: &ScaleRule) -> Result<Vec<Module>> {
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
        match algorithm {
            Algorithm::LowRank => self.low_rank(key, path, rule).map(|module| vec![module]),
            other => Err(Error::unsupported(
                &file,
                format!("has a {} of {key}, which cannot be read yet", other.name()),
            )),
        }
    }

    /// The algorithm by the parts that are there, or in words why it is none.
    fn algorithm(&self, key: &str) -> Result<Algorithm, String> {
        let known = || {
            let of_part = |(part, tensor): &(Part, Tensor)| {
                Algorithm::of(*part).map(|found| (found, tensor.name.clone()))
            };
            self.parts.iter().filter_map(of_part)
        };
        let Some((algorithm, name)) = known().next() else {
            return Err(format!("has {} but not its factors", self.parts[0].1.name));
        };
        match known().find(|(other, _)| *other != algorithm) {
            None => Ok(algorithm),
            Some((other, second)) => Err(format!(
                "has {name} of a {} and {second} of a {} for one module, {key}; keep the one that \
                 was meant",
                algorithm.name(),
                other.name()
            )),
        }
    }

    /// A product of two matrices.
    fn low_rank(mut self, key: &str, path: &str, rule: &ScaleRule) -> Result<Module> {
        let file = self.parts[0].1.file().path().to_path_buf();
        let broken = |message: String| Error::adapter(&file, message);
        let (a, b) = match (self.take(Part::Down), self.take(Part::Up)) {
            (Some(a), Some(b)) => (a, b),
            (Some(a), None) => return Err(broken(format!("has {} but not its lora_up", a.name))),
            (None, Some(b)) => return Err(broken(format!("has {} but not its lora_down", b.name))),
            (None, None) => {
                let name = &self.parts[0].1.name;
                return Err(broken(format!("has {name} but not its factors")));
            }
        };
        if let Some(found) = foreign::experts(&a, &b, None) {
            return Err(Error::unsupported(&file, found));
        }
        let is_pair = a.shape.len() >= 2
            && a.shape.len() == b.shape.len()
            && a.shape[0] == b.shape[1]
            && b.shape[2..].iter().all(|extent| *extent == 1);
        if !is_pair {
            return Err(broken(format!(
                "{} of shape {:?} and {} of shape {:?} are no pair of factors",
                a.name, a.shape, b.name, b.shape
            )));
        }
        let rank = a.shape[0];
        check_rank(&a, rank).map_err(broken)?;
        if let Some(mid) = self.get(Part::Mid) {
            let message = format!("has {} of {key}, which cannot be read yet", mid.name);
            return Err(Error::unsupported(&file, message));
        }
        if let Some((_, tensor)) = self.parts.iter().find(|(part, _)| {
            matches!(part, Part::Magnitude | Part::OutputMagnitude | Part::BiasDifference)
        }) {
            let message = format!("has {} of {key}, which cannot be read yet", tensor.name);
            return Err(Error::unsupported(&file, message));
        }
        let kind = if a.shape.len() == 2 { LayerKind::Linear } else { LayerKind::Convolution };
        let (alpha, scaling) = self.scale(rank, rule)?;
        let bias = self.take(Part::UpBias);
        if let Some(bias) = bias.as_ref().filter(|bias| bias.elements() != b.shape[0]) {
            return Err(broken(format!(
                "{} has shape {:?} but its module has {} outputs",
                bias.name, bias.shape, b.shape[0]
            )));
        }
        Ok(Module {
            key: key.to_owned(),
            path: path.to_owned(),
            parameters: Vec::new(),
            kind,
            delta: Arc::new(LowRank { a, b, diagonal: None }),
            scale: self.take(Part::Scale).or_else(|| self.take(Part::Alpha)),
            magnitude: None,
            bias,
            rank,
            alpha,
            scaling,
        })
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
        if value == 0.0 {
            return Err(Error::adapter(
                alpha.file().path(),
                format!(
                    "{} is 0, which some programs read as the rank and others as no update; write \
                     the alpha that was meant",
                    alpha.name
                ),
            ));
        }
        Ok((value, value / count))
    }
}

/// Whether a rank is one that a module can have.
fn check_rank(tensor: &Tensor, rank: u64) -> Result<(), String> {
    if rank == 0 || rank > limits::RANK {
        return Err(format!(
            "{} has rank {rank}; a rank is from 1 to {}",
            tensor.name,
            limits::RANK
        ));
    }
    Ok(())
}

/// The finite number that a tensor of one element holds.
///
/// # Errors
/// [`Error::Adapter`] if it is none, [`Error::Io`].
fn number(tensor: &Tensor) -> Result<f64> {
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_ending_tells_the_part_and_who_writes_it_so() {
        for (key, module, part, spelling) in [
            ("lora_unet_a.lora_down.weight", "lora_unet_a", Part::Down, Spelling::Kohya),
            ("a.b.lora_B.default.weight", "a.b", Part::Up, Spelling::PeftDefault),
            ("a.b.lora_A", "a.b", Part::Down, Spelling::PeftBare),
            ("a.lora.up.weight", "a", Part::Up, Spelling::LoraLayer),
            ("a.processor.to_q_lora.up.weight", "a.processor.to_q", Part::Up, {
                Spelling::AttentionProcessor
            }),
            ("a.lora_linear_layer.down.weight", "a", Part::Down, Spelling::LoraLinearLayer),
            ("a.lokr_w1_a", "a", Part::Kronecker(Kronecker::W1A), Spelling::Lycoris),
            ("a.lokr_w1", "a", Part::Kronecker(Kronecker::W1), Spelling::Lycoris),
            ("a.a1.weight", "a", Part::GLora(GLora::A1), Spelling::Lycoris),
            ("a.weight", "a", Part::Weight, Spelling::Shared),
            ("a.diff_b", "a", Part::BiasDifference, Spelling::Shared),
            ("a.lora_magnitude_vector.weight", "a", Part::OutputMagnitude, Spelling::Peft),
            ("a.bora_scale_r", "a", Part::Refused(FORK), Spelling::Lycoris),
        ] {
            assert_eq!(split(key), Some((module, part, spelling)), "{key}");
        }
        assert_eq!(split(".alpha"), None);
        assert_eq!(split("a.bias"), None);
    }
}
