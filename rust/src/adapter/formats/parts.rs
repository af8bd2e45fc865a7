//! The parts of a module in files of one tensor a part, as trainers of image models write them: which
//! part a tensor plays by the end of its name, and the modules that the parts of one make.

use std::path::Path;
use std::sync::Arc;

use crate::adapter::deltas::{
    self, Difference, Generalized, HadamardSide, KroneckerSide, LowRank, Orthogonal,
    RescaledInputs, Scaled, Tucker,
};
use crate::adapter::{Delta, LayerKind, Module, foreign};
use crate::error::{Error, Result, with_article};
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

/// Whether the first extent of a part is the rank as trainers call it.
pub fn tells_rank(part: Part) -> bool {
    matches!(
        part,
        Part::Down
            | Part::Hadamard(Hadamard::W1B)
            | Part::Kronecker(Kronecker::W1B | Kronecker::W2B)
    )
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
    fn need(&mut self, part: Part, what: &str) -> Result<Tensor> {
        if let Some(tensor) = self.take(part) {
            return Ok(tensor);
        }
        Err(lacks(self.named_by.as_ref().expect("set before any part is taken"), what))
    }

    /// A product of two matrices, with a core between them or without.
    fn low_rank(&mut self) -> Result<Made> {
        if self.get(Part::Down).is_none() && self.get(Part::Up).is_none() {
            return self.need(Part::Down, "factors").map(|_| unreachable!("it is not there"));
        }
        let (a, b) = match (self.take(Part::Down), self.take(Part::Up)) {
            (Some(a), Some(b)) => (a, b),
            (Some(a), None) => return Err(lacks(&a, "lora_up")),
            (_, Some(b)) => return Err(lacks(&b, "lora_down")),
            (None, None) => unreachable!("one of them is there"),
        };
        let file = a.file().path().to_path_buf();
        let broken = |message: String| Error::adapter(&file, message);
        if let Some(found) = foreign::experts(&a, &b, None) {
            return Err(Error::unsupported(&file, found));
        }
        let ones = |extents: &[u64]| extents.iter().all(|extent| *extent == 1);
        if let Some(mid) = self.take(Part::Mid) {
            let fits = mid.shape.len() >= 2
                && a.shape.len() >= 2
                && b.shape.len() >= 2
                && (b.shape[1], mid.shape[1]) == (mid.shape[0], a.shape[0])
                && ones(&a.shape[2..])
                && ones(&b.shape[2..]);
            if !fits {
                return Err(broken(format!(
                    "{} of shape {:?}, {} of shape {:?} and {} of shape {:?} are no factors with a core \
                     between them",
                    a.name, a.shape, mid.name, mid.shape, b.name, b.shape
                )));
            }
            let rank = a.shape[0];
            check_rank(&a, rank).map_err(broken)?;
            check_rank(&mid, mid.shape[0]).map_err(broken)?;
            let delta: Arc<dyn Delta> = Arc::new(Tucker { down: a, mid, up: b });
            return Ok(Made::of(delta, rank));
        }
        let is_pair = a.shape.len() >= 2
            && a.shape.len() == b.shape.len()
            && a.shape[0] == b.shape[1]
            && ones(&b.shape[2..]);
        if !is_pair {
            return Err(broken(format!(
                "{} of shape {:?} and {} of shape {:?} are no pair of factors",
                a.name, a.shape, b.name, b.shape
            )));
        }
        let rank = a.shape[0];
        check_rank(&a, rank).map_err(broken)?;
        let kind = if a.shape.len() == 2 { LayerKind::Linear } else { LayerKind::Convolution };
        let delta = Arc::new(LowRank { a, b, diagonal: None });
        Ok(Made { delta, rank, kind, has_scale: HasScale::Always })
    }

    /// LoHa.
    fn hadamard(&mut self) -> Result<Made> {
        use Hadamard::{T1, T2, W1A, W1B, W2A, W2B};
        let mut side = |a, b, core| -> Result<_> {
            let a = self.need(
                Part::Hadamard(a),
                "other factors (hada_w1_a, hada_w1_b, hada_w2_a, hada_w2_b)",
            )?;
            let b = self.need(
                Part::Hadamard(b),
                "other factors (hada_w1_a, hada_w1_b, hada_w2_a, hada_w2_b)",
            )?;
            Ok(HadamardSide { a, b, core: self.take(Part::Hadamard(core)) })
        };
        let (first, second) = (side(W1A, W1B, T1)?, side(W2A, W2B, T2)?);
        let file = first.a.file().path().to_path_buf();
        let broken = |message: String| Error::adapter(&file, message);
        let extents = [&first, &second].map(|side| hadamard_extents(side));
        let [Some((outputs, input_shape)), Some((others, other_shape))] = extents else {
            return Err(broken(no_factors(&hadamard_tensors(&first, &second), "a LoHa")));
        };
        let inputs = |shape: &[u64]| shape.iter().product::<u64>();
        let same = (outputs, inputs(&input_shape)) == (others, inputs(&other_shape));
        if !same || first.core.is_some() != second.core.is_some() {
            return Err(broken(no_factors(&hadamard_tensors(&first, &second), "a LoHa")));
        }
        let rank = first.b.shape[0];
        check_rank(&first.b, rank).map_err(broken)?;
        check_rank(&second.b, second.b.shape[0]).map_err(broken)?;
        Ok(Made::of(Arc::new(deltas::Hadamard { first, second, outputs, input_shape }), rank))
    }

    /// LoKr.
    fn kronecker(&mut self) -> Result<Made> {
        use Kronecker::{T2, W1, W1A, W1B, W2, W2A, W2B};
        let mut side = |[whole, a, b]: [Kronecker; 3], core: Option<Kronecker>| -> Result<_> {
            let words = if whole == W1 { "lokr_w1" } else { "lokr_w2" };
            let core = core.and_then(|core| self.take(Part::Kronecker(core)));
            let parts = [whole, a, b].map(|part| self.take(Part::Kronecker(part)));
            match (parts, core) {
                ([Some(whole), None, None], None) => Ok(KroneckerSide::Whole(whole)),
                ([None, Some(a), Some(b)], None) => Ok(KroneckerSide::Product(a, b)),
                ([None, Some(a), Some(b)], Some(core)) => Ok(KroneckerSide::Tucker(core, a, b)),
                ([None, None, None], None) => self
                    .need(Part::Kronecker(whole), words)
                    .map(|_| unreachable!("it is not there")),
                (parts, core) => {
                    let found: Vec<_> = parts.iter().flatten().chain(&core).collect();
                    Err(Error::adapter(
                        found[0].file().path(),
                        format!(
                            "has {} of {words}, which is either whole or two factors",
                            found
                                .iter()
                                .map(|one| one.name.as_str())
                                .collect::<Vec<_>>()
                                .join(", ")
                        ),
                    ))
                }
            }
        };
        let first = side([W1, W1A, W1B], None)?;
        let second = side([W2, W2A, W2B], Some(T2))?;
        let tensors = || -> Vec<Tensor> {
            let of_side =
                |side: &KroneckerSide| side.tensors().into_iter().cloned().collect::<Vec<_>>();
            [of_side(&first), of_side(&second)].concat()
        };
        let broken = |message: String| Error::adapter(tensors()[0].file().path(), message);
        let (Some(kernel_of_first), Some(kernel)) = (kernel_of(&first), kernel_of(&second)) else {
            return Err(broken(no_factors(&tensors(), "a LoKr")));
        };
        if kernel_of_first.iter().any(|extent| *extent != 1) {
            return Err(broken(no_factors(&tensors(), "a LoKr")));
        }
        let (width, other) = (first.extents().1, second.extents().1);
        let input_shape = if kernel.is_empty() {
            vec![width * other]
        } else {
            let channels = other / kernel.iter().product::<u64>().max(1);
            [&[width * channels], &*kernel].concat()
        };
        let stored = |side: &KroneckerSide| match side {
            KroneckerSide::Whole(_) => None,
            KroneckerSide::Product(_, b) | KroneckerSide::Tucker(_, _, b) => Some(b.shape[0]),
        };
        let rank = stored(&second).or_else(|| stored(&first));
        let delta = deltas::Kronecker { first: first.clone(), second: second.clone(), input_shape };
        if delta.rank() == 0 || delta.rank() > limits::RANK {
            return Err(broken(no_factors(&tensors(), "a LoKr")));
        }
        let has_scale = if rank.is_none() { HasScale::InPeft } else { HasScale::Always };
        let rank = rank.unwrap_or_else(|| delta.rank());
        Ok(Made { has_scale, ..Made::of(Arc::new(delta), rank) })
    }

    /// GLoRA.
    fn generalized(&mut self) -> Result<Made> {
        use GLora::{A1, A2, B1, B2, BM};
        let words = "other factors (a1, a2, b1, b2)";
        if let Some(core) = self.get(Part::GLora(BM)) {
            let message = format!(
                "has {}, the core of a GLoRA in Tucker's form, which cannot be read",
                core.name
            );
            return Err(Error::unsupported(core.file().path(), message));
        }
        let mut need = |part| self.need(Part::GLora(part), words);
        let (a1, a2, b1, b2) = (need(A1)?, need(A2)?, need(B1)?, need(B2)?);
        let all = [a1, a2, b1, b2];
        let file = all[0].file().path().to_path_buf();
        let broken = |message: String| Error::adapter(&file, message);
        let ones = |extents: &[u64]| extents.iter().all(|extent| *extent == 1);
        // Early files have each pair the other way round; the rank is the smaller extent.
        let is_pair = |left: &Tensor, right: &Tensor| {
            left.shape.len() >= 2
                && right.shape.len() >= 2
                && left.shape[1] == right.shape[0]
                && ones(&left.shape[2..])
                && left.shape[1] <= left.shape[0].max(right.shape[1])
        };
        let [a1, a2, b1, b2] = &all;
        let is_modern = is_pair(a1, a2) && is_pair(b1, b2) && a1.shape[1] <= a1.shape[0];
        let is_early = is_pair(a2, a1) && is_pair(b2, b1);
        let (of_weight, added) = match (is_modern, is_early) {
            (true, _) => ([a1.clone(), a2.clone()], [b1.clone(), b2.clone()]),
            (false, true) => ([a2.clone(), a1.clone()], [b2.clone(), b1.clone()]),
            (false, false) => return Err(broken(no_factors(&all, "a GLoRA"))),
        };
        let inputs = [of_weight[0].shape[0], of_weight[1].shape[1], added[1].shape[1]];
        if inputs != [inputs[0]; 3] || !ones(&of_weight[1].shape[2..]) {
            return Err(broken(no_factors(&all, "a GLoRA")));
        }
        let rank = added[1].shape[0];
        check_rank(&added[1], rank).map_err(broken)?;
        Ok(Made::of(Arc::new(Generalized { of_weight, added }), rank))
    }

    /// LyCORIS's IA³.
    fn scaled(&mut self) -> Result<Made> {
        if let Some(weight) = self.get(Part::Weight)
            && self.get(Part::OnInput).is_none()
        {
            let problem =
                format!("holds {}, which is no part of an update that is known", weight.name);
            return Err(Error::unsupported(weight.file().path(), problem));
        }
        if let Some(vector) = self.get(Part::Ia3) {
            let problem = format!(
                "holds {}, a part of an IA3 adapter of PEFT's, of which its config tells whether inputs \
                 or outputs are scaled",
                vector.name
            );
            return Err(Error::unsupported(vector.file().path(), problem));
        }
        let vector = self.need(Part::Weight, "weight")?;
        let flag = self.need(Part::OnInput, "on_input")?;
        check_vector(&vector).map_err(|message| Error::adapter(vector.file().path(), message))?;
        let on_input = number(&flag)? != 0.0;
        let scaled =
            Scaled { vector, on_input, less_one: true, with_bias: false, flag: Some(flag) };
        Ok(Made { has_scale: HasScale::Never, ..Made::of(Arc::new(scaled), 1) })
    }

    /// Diag-OFT or BOFT.
    fn orthogonal(&mut self) -> Result<Made> {
        let blocks = self.need(Part::OrthogonalBlocks, "oft_blocks")?;
        let (rescale, constraint) = (self.take(Part::Rescale), self.take(Part::Alpha));
        let broken = |message: String| Error::adapter(blocks.file().path(), message);
        let is_sound = match *blocks.shape.as_slice() {
            [count, rows, columns] => count > 0 && rows > 0 && rows == columns,
            [stages, count, rows, columns] => {
                // The butterflies have to come out even.
                let run = u32::try_from(stages.saturating_sub(1)).ok().and_then(|shift| {
                    1u64.checked_shl(shift).and_then(|runs| runs.checked_mul(rows))
                });
                let fits = run.is_some_and(|run| run > 0 && (count * rows).is_multiple_of(run));
                stages > 0 && count > 0 && rows == columns && rows.is_multiple_of(2) && fits
            }
            _ => false,
        };
        if !is_sound {
            let problem =
                format!("{} of shape {:?} is no set of square blocks", blocks.name, blocks.shape);
            return Err(broken(problem));
        }
        let rank = blocks.shape[blocks.shape.len() - 1];
        check_rank(&blocks, rank).map_err(broken)?;
        if let Some(constraint) = &constraint {
            number(constraint)?;
        }
        let orthogonal = Orthogonal { blocks: blocks.clone(), constraint, rescale };
        if let Some(rescale) = orthogonal.rescale.as_ref()
            && rescale.elements() != orthogonal.outputs()
        {
            return Err(broken(format!(
                "{} has shape {:?} but its module has {} outputs",
                rescale.name,
                rescale.shape,
                orthogonal.outputs()
            )));
        }
        Ok(Made { has_scale: HasScale::Never, ..Made::of(Arc::new(orthogonal), rank) })
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

/// A delta, and what its module needs to know beside it.
struct Made {
    delta: Arc<dyn Delta>,
    /// The rank as trainers call it.
    rank: u64,
    kind: LayerKind,
    has_scale: HasScale,
}

/// Whether a scale belongs to a delta.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum HasScale {
    Always,
    /// Only where [`ScaleRule::scales_whole_factors`] says so.
    InPeft,
    Never,
}

impl Made {
    fn of(delta: Arc<dyn Delta>, rank: u64) -> Self {
        let is_convolution = delta.input_shape().len() > 1;
        let kind = if is_convolution { LayerKind::Convolution } else { LayerKind::Linear };
        Self { delta, rank, kind, has_scale: HasScale::Always }
    }
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

/// That a factor lacks another one.
fn lacks(tensor: &Tensor, what: &str) -> Error {
    let problem = format!("has {} but not its {what}", tensor.name);
    Error::adapter(tensor.file().path(), problem)
}

/// That tensors' shapes do not make something, in words.
fn no_factors(tensors: &[Tensor], what: &str) -> String {
    let listed =
        tensors.iter().map(|tensor| format!("{} of shape {:?}", tensor.name, tensor.shape));
    format!("{} are no factors of {what}", listed.collect::<Vec<_>>().join(", "))
}

fn hadamard_tensors(first: &HadamardSide, second: &HadamardSide) -> Vec<Tensor> {
    let of_side = |side: &HadamardSide| {
        [&side.a, &side.b].into_iter().chain(&side.core).cloned().collect::<Vec<_>>()
    };
    [of_side(first), of_side(second)].concat()
}

/// The outputs and the input extents of one of LoHa's products, where its shapes fit together.
fn hadamard_extents(HadamardSide { a, b, core }: &HadamardSide) -> Option<(u64, Vec<u64>)> {
    let ones = |extents: &[u64]| extents.iter().all(|extent| *extent == 1);
    let &[rows, columns, ref rest @ ..] = a.shape.as_slice() else { return None };
    let &[rank, inputs, ref kernel @ ..] = b.shape.as_slice() else { return None };
    match core {
        None => (columns == rank && ones(rest)).then(|| (rows, b.shape[1..].to_vec())),
        Some(core) => {
            let &[left, right, ref extents @ ..] = core.shape.as_slice() else { return None };
            let fits = (left, right) == (rows, rank) && ones(rest) && ones(kernel);
            fits.then(|| (columns, [&[inputs], extents].concat()))
        }
    }
}

/// The extents of a kernel that one side of a Kronecker product has, where its shapes fit together.
fn kernel_of(side: &KroneckerSide) -> Option<Vec<u64>> {
    let ones = |extents: &[u64]| extents.iter().all(|extent| *extent == 1);
    let (kernel, fits) = match side {
        KroneckerSide::Whole(whole) => (whole.shape.get(2..)?, true),
        KroneckerSide::Product(a, b) => {
            let kernel = b.shape.get(2..)?;
            (kernel, ones(a.shape.get(2..)?) && a.shape[1] == b.shape[0])
        }
        KroneckerSide::Tucker(core, a, b) => {
            let kernel = core.shape.get(2..)?;
            let flat = ones(a.shape.get(2..)?) && ones(b.shape.get(2..)?);
            (kernel, flat && (core.shape[0], core.shape[1]) == (a.shape[0], b.shape[0]))
        }
    };
    let all = side.tensors().into_iter().all(|tensor| tensor.elements() > 0);
    (fits && all).then(|| kernel.to_vec())
}

/// Whether a tensor is one number for each of something.
fn check_vector(tensor: &Tensor) -> Result<(), String> {
    let wide = tensor.shape.iter().filter(|extent| **extent != 1).count();
    match wide <= 1 && tensor.elements() > 0 {
        true => Ok(()),
        false => Err(format!("{} has shape {:?}; it is a vector", tensor.name, tensor.shape)),
    }
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
