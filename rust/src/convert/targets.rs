//! The formats that adapters are converted to: what each can hold, and how it names modules.

use std::collections::BTreeSet;

use serde_json::Value;

use super::methods;
use super::modules::Converted;
use super::naming::Naming;
use super::places;
use crate::adapter::formats::image::NUMBERED;
use crate::adapter::formats::image::layout::Layout;
use crate::adapter::formats::write_parts;
use crate::adapter::{Adapter, Grammar, LayerKind, Module, grammar};
use crate::checkpoint::components::ComponentKind;
use crate::checkpoint::names::diffusion::{ComponentNames, DiffusionNames};
use crate::error::{Error, Result};

/// What a format has a place for beside plain factors.
#[derive(Debug, Clone, Copy)]
pub(super) struct Holds {
    /// DoRA's magnitudes of outputs.
    pub magnitude: bool,
    /// Biases of second factors.
    pub bias: bool,
    /// Parameters that were trained whole, and rows of embeddings.
    pub whole: bool,
    /// Norms and biases.
    pub vectors: bool,
    /// Updates of embeddings.
    pub embeddings: bool,
    /// Convolutions.
    pub convolutions: bool,
    /// Text encoders beside the model that they are of.
    pub text_encoders: bool,
}

/// Which factors a format's writer takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Factors {
    /// Two matrices.
    Plain,
    /// These, and the parts of every algorithm of LyCORIS.
    Parts,
    /// Two matrices, and the parts of LoHa and LoKr that OneTrainer has.
    PartsOfOneTrainer,
    /// Two matrices, or the parts of LoHa, LoKr or IA3 where all modules are of one of them.
    Methods,
    /// Those of every product, which it brings into its own layout.
    Any,
}

/// How a format names the modules of diffusion models.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Names {
    /// `lora_unet_` and the like before flattened names.
    Kohya,
    /// `diffusion_model.` before the author's names.
    ComfyUi,
    /// `unet.` or `transformer.` before diffusers' names.
    Diffusers,
    /// The bare names of one component, which has a folder of its own where there are several.
    Folders,
    /// `lycoris_` before diffusers' flattened names, and kohya's names of text encoders beside them.
    Lycoris,
    /// `lora_transformer_` or `lora_unet_` before diffusers' flattened names.
    OneTrainer,
    /// The author's names as they are.
    Bfl,
    /// XLabs' names of attention's layers in Flux.
    XLabs,
}

/// A format that can be written.
#[derive(Debug)]
pub(super) struct Target {
    pub name: &'static str,
    pub is_directory: bool,
    pub is_flattened: bool,
    pub holds: Holds,
    pub factors: Factors,
    pub(super) names: Names,
}

const NOTHING: Holds = Holds {
    magnitude: false,
    bias: false,
    whole: false,
    vectors: false,
    embeddings: true,
    convolutions: false,
    text_encoders: true,
};

const TARGETS: [Target; 12] = [
    Target {
        name: "peft",
        is_directory: true,
        is_flattened: false,
        holds: Holds { magnitude: true, bias: true, whole: true, convolutions: true, ..NOTHING },
        factors: Factors::Methods,
        names: Names::Folders,
    },
    Target {
        name: "kohya",
        is_directory: false,
        is_flattened: true,
        holds: Holds {
            magnitude: true,
            vectors: true,
            embeddings: false,
            convolutions: true,
            ..NOTHING
        },
        factors: Factors::Parts,
        names: Names::Kohya,
    },
    Target {
        name: "diffusers",
        is_directory: false,
        is_flattened: false,
        holds: Holds {
            magnitude: true,
            bias: true,
            embeddings: false,
            convolutions: true,
            ..NOTHING
        },
        factors: Factors::Plain,
        names: Names::Diffusers,
    },
    Target {
        name: "comfyui",
        is_directory: false,
        is_flattened: false,
        holds: Holds {
            magnitude: true,
            vectors: true,
            embeddings: false,
            convolutions: true,
            ..NOTHING
        },
        factors: Factors::Parts,
        names: Names::ComfyUi,
    },
    Target {
        name: "lycoris",
        is_directory: false,
        is_flattened: true,
        holds: Holds {
            magnitude: true,
            vectors: true,
            embeddings: false,
            convolutions: true,
            ..NOTHING
        },
        factors: Factors::Parts,
        names: Names::Lycoris,
    },
    Target {
        name: "onetrainer",
        is_directory: false,
        is_flattened: true,
        holds: Holds { magnitude: true, embeddings: false, convolutions: true, ..NOTHING },
        factors: Factors::PartsOfOneTrainer,
        names: Names::OneTrainer,
    },
    Target {
        name: "xlabs",
        is_directory: false,
        is_flattened: false,
        holds: Holds { embeddings: false, text_encoders: false, ..NOTHING },
        factors: Factors::Plain,
        names: Names::XLabs,
    },
    Target {
        name: "bfl",
        is_directory: false,
        is_flattened: false,
        holds: Holds {
            bias: true,
            whole: true,
            embeddings: false,
            text_encoders: false,
            ..NOTHING
        },
        factors: Factors::Plain,
        names: Names::Bfl,
    },
    Target {
        name: "mlx",
        is_directory: true,
        is_flattened: false,
        holds: Holds { magnitude: true, ..NOTHING },
        factors: Factors::Any,
        names: Names::Folders,
    },
    Target {
        name: "gguf",
        is_directory: false,
        is_flattened: false,
        holds: NOTHING,
        factors: Factors::Any,
        names: Names::Folders,
    },
    Target {
        name: "torchtune",
        is_directory: true,
        is_flattened: false,
        holds: Holds { magnitude: true, ..NOTHING },
        factors: Factors::Plain,
        names: Names::Folders,
    },
    Target {
        name: "tinker",
        is_directory: true,
        is_flattened: false,
        holds: NOTHING,
        factors: Factors::Plain,
        names: Names::Folders,
    },
];

/// The names of all of them.
pub(super) fn names() -> Vec<&'static str> {
    TARGETS.iter().map(|target| target.name).collect()
}

/// What is written in one place.
pub(super) struct Piece {
    /// The folder of its component, where there are several.
    pub folder: Option<String>,
    pub converted: Vec<Converted>,
}

impl Target {
    /// The format of that name.
    ///
    /// # Errors
    /// [`Error::Argument`] if it cannot be written.
    pub fn of(name: &str) -> Result<&'static Self> {
        if name == Layout::CloneOfSimo.name() {
            return Err(Error::Argument(format!("adapters {NUMBERED}")));
        }
        let found = TARGETS.iter().find(|target| target.name == name);
        found.ok_or_else(|| super::unknown_format(name))
    }

    /// Whether the format has a module's own factors as they are.
    pub fn keeps(&self, module: &Module) -> bool {
        match self.factors {
            Factors::Plain | Factors::Any => false,
            Factors::Methods => methods::is_of_method(module),
            Factors::Parts => write_parts::has_own_parts(module),
            Factors::PartsOfOneTrainer => {
                write_parts::has_own_parts(module) && write_parts::is_of_one_trainer(module)
            }
        }
    }

    /// Whether what reads as that format is in this one as well: tinker's files are PEFT's where no
    /// module has a name of tinker's.
    pub fn also_reads_as(&self, format: &str) -> bool {
        self.name == "tinker" && format == "peft"
    }

    /// A module with what the format can hold of it; `None` if that is nothing.
    pub fn reduced(&self, module: &Module) -> Option<Module> {
        if !self.has_place(module) {
            return None;
        }
        let mut own = module.clone();
        if !self.holds.magnitude {
            own.magnitude = None;
        }
        if !self.holds.bias {
            own.bias = None;
        }
        Some(own)
    }

    fn has_place(&self, module: &Module) -> bool {
        match module.kind {
            LayerKind::Linear => true,
            LayerKind::Embedding => self.holds.embeddings,
            LayerKind::Convolution => self.holds.convolutions,
            LayerKind::Norm | LayerKind::Bias => self.holds.vectors,
        }
    }

    /// The naming of a module of that full name in the base.
    pub fn naming(&self, names: &DiffusionNames, path: &str) -> Naming {
        let Some(component) = names.component_of(path) else { return Naming::Diffusers };
        if component.kind != ComponentKind::Denoiser {
            return Naming::Diffusers;
        }
        match self.names {
            Names::ComfyUi | Names::Bfl => Naming::Original,
            Names::XLabs => Naming::WithoutMlp,
            Names::Kohya if component.is_unet() && !component.has_added_conditions() => {
                Naming::Diffusers
            }
            Names::Kohya => Naming::Original,
            Names::Diffusers | Names::Folders | Names::Lycoris | Names::OneTrainer => {
                Naming::Diffusers
            }
        }
    }

    /// The modules under the format's own keys, in the places where they are written.
    ///
    /// # Errors
    /// [`Error::Unsupported`] where only a base tells the names.
    pub fn pieces(
        &self,
        adapter: &Adapter,
        converted: Vec<Converted>,
        names: Option<&DiffusionNames>,
    ) -> Result<Vec<Piece>> {
        let mut located = Vec::with_capacity(converted.len());
        for one in converted {
            let (kind, body) = locate(adapter, &one.module, names, self)?;
            located.push((kind, body, one));
        }
        let kinds: BTreeSet<usize> = located.iter().map(|(kind, ..)| order(*kind)).collect();
        let text_encoders = match names {
            Some(names) => names.components().iter().filter(|one| is_text(Some(one.kind))).count(),
            None => kinds.iter().filter(|order| (1..OTHERS).contains(*order)).count(),
        };
        let is_unet = match names {
            Some(names) => names.components().iter().any(ComponentNames::is_unet),
            None => located.iter().any(|(_, body, _)| UNET.iter().any(|one| body.starts_with(one))),
        };
        let mut pieces = Vec::<Piece>::new();
        for (kind, body, mut one) in located {
            let folder = || match kind {
                None | Some(ComponentKind::Denoiser) if is_unet => "unet".to_owned(),
                None | Some(ComponentKind::Denoiser) => "transformer".to_owned(),
                Some(ComponentKind::TextEncoder(1)) => "text_encoder".to_owned(),
                Some(ComponentKind::TextEncoder(number)) => format!("text_encoder_{number}"),
                Some(ComponentKind::Vae) => "vae".to_owned(),
                Some(ComponentKind::Other) => "other".to_owned(),
            };
            let key = match (self.names, kind) {
                _ if self.is_flattened && adapter.grammar() == Grammar::Flattened => {
                    one.module.path.clone()
                }
                (Names::Kohya, kind) => format!(
                    "{}{}",
                    kohya_prefix(kind, &body, text_encoders),
                    body.replace('.', "_")
                ),
                (Names::ComfyUi, None | Some(ComponentKind::Denoiser)) => {
                    format!("diffusion_model.{body}")
                }
                (Names::ComfyUi, Some(kind)) => {
                    format!("text_encoders.{}.transformer.{body}", comfy_name(kind, &body))
                }
                (Names::Diffusers, _) => format!("{}.{body}", folder()),
                (Names::Lycoris, Some(ComponentKind::TextEncoder(_))) if kinds.len() > 1 => {
                    format!(
                        "{}{}",
                        kohya_prefix(kind, &body, text_encoders),
                        body.replace('.', "_")
                    )
                }
                (Names::Lycoris, _) => format!("lycoris_{}", body.replace('.', "_")),
                (Names::OneTrainer, Some(ComponentKind::TextEncoder(number))) => {
                    // By its number, a T5's too.
                    let number = if text_encoders < 2 { String::new() } else { number.to_string() };
                    format!("lora_te{number}_{}", body.replace('.', "_"))
                }
                (Names::OneTrainer, _) => {
                    let model = if is_unet { "unet" } else { "transformer" };
                    format!("lora_{model}_{}", body.replace('.', "_"))
                }
                (Names::Folders | Names::XLabs | Names::Bfl, _) => body,
            };
            let folder = (self.names == Names::Folders && kinds.len() > 1).then(folder);
            let is_bias = one.module.kind == LayerKind::Bias;
            let is_of_experts = !one.module.parameters.is_empty();
            let own = is_of_experts.then(|| one.module.key.clone());
            one.module.path.clone_from(&key);
            one.module.key = if is_bias { format!("{key}.bias") } else { own.unwrap_or(key) };
            match pieces.iter_mut().find(|piece| piece.folder == folder) {
                Some(piece) => piece.converted.push(one),
                None => pieces.push(Piece { folder, converted: vec![one] }),
            }
        }
        Ok(pieces)
    }
}

/// The component of a module, and its name within it.
fn locate(
    adapter: &Adapter,
    module: &Module,
    names: Option<&DiffusionNames>,
    target: &Target,
) -> Result<(Option<ComponentKind>, String)> {
    if let Some(names) = names {
        let component = names.component_of(&module.path);
        let body = component.and_then(|found| module.path.strip_prefix(found.prefix.as_str()));
        return match (component, body) {
            (Some(component), Some(body)) => Ok((Some(component.kind), body.to_owned())),
            _ => Err(Error::unsupported(
                adapter.path(),
                format!("its module {} fits nothing in the base", module.path),
            )),
        };
    }
    let needs = |why: &str| {
        Err(Error::unsupported(
            adapter.path(),
            format!("{why}; give the base (base=, --base), which tells"),
        ))
    };
    if adapter.grammar() == Grammar::Flattened {
        return match places::keeps_flattened(adapter, &module.path, target) {
            true => Ok((None, module.path.clone())),
            false => needs("has flattened names, of which only the base tells where the dots were"),
        };
    }
    // `transformer.h.0` is a language model's own name, and no component of a pipeline.
    let (kind, body) = match OF_LANGUAGE_MODELS.contains(&adapter.format()) {
        true => (None, module.path.as_str()),
        false => grammar::component_of(&module.path),
    };
    let begins = |blocks: &[&str]| blocks.iter().any(|block| body.starts_with(block));
    let wrong = match target.names {
        Names::ComfyUi | Names::XLabs | Names::Bfl => begins(&DIFFUSERS),
        Names::Kohya => begins(&["transformer_blocks.", "single_transformer_blocks."]),
        Names::Diffusers | Names::Folders | Names::Lycoris | Names::OneTrainer => begins(&ORIGINAL),
    };
    // What is in the format already keeps its names, but where those of several programs are in it.
    let keeps = adapter.format() == target.name && target.names != Names::OneTrainer;
    let is_other = wrong && !keeps || places::needs_base(adapter, body, target);
    if !is_text(kind) && is_other {
        return needs(&format!(
            "names its modules otherwise than files in the format {} do ({body})",
            target.name
        ));
    }
    Ok((kind, body.to_owned()))
}

/// The formats whose names tell no component.
const OF_LANGUAGE_MODELS: [&str; 5] = ["peft", "mlx", "gguf", "torchtune", "tinker"];

/// What the modules of a denoiser begin with where diffusers names them.
const DIFFUSERS: [&str; 5] = [
    "transformer_blocks.",
    "single_transformer_blocks.",
    "down_blocks.",
    "up_blocks.",
    "mid_block.",
];
/// What those of a UNet begin with, whoever names them.
const UNET: [&str; 6] = [
    "down_blocks.",
    "up_blocks.",
    "mid_block.",
    "input_blocks.",
    "output_blocks.",
    "middle_block.",
];
/// The same where the author does, and diffusers does not.
const ORIGINAL: [&str; 6] = [
    "double_blocks.",
    "single_blocks.",
    "joint_blocks.",
    "input_blocks.",
    "output_blocks.",
    "middle_block.",
];

fn is_text(kind: Option<ComponentKind>) -> bool {
    matches!(kind, Some(ComponentKind::TextEncoder(_)))
}

/// Behind all text encoders.
const OTHERS: usize = 1000;

fn order(kind: Option<ComponentKind>) -> usize {
    match kind {
        None | Some(ComponentKind::Denoiser) => 0,
        Some(ComponentKind::TextEncoder(number)) => number.min(OTHERS - 1),
        Some(ComponentKind::Vae) => OTHERS,
        Some(ComponentKind::Other) => OTHERS + 1,
    }
}

/// How the modules of a T5 begin.
const T5: &str = "encoder.block.";

fn kohya_prefix(kind: Option<ComponentKind>, body: &str, text_encoders: usize) -> String {
    match kind {
        Some(ComponentKind::TextEncoder(_)) if body.starts_with(T5) => "lora_te3_".to_owned(),
        Some(ComponentKind::TextEncoder(_)) if text_encoders < 2 => "lora_te_".to_owned(),
        Some(ComponentKind::TextEncoder(number)) => format!("lora_te{number}_"),
        _ => "lora_unet_".to_owned(),
    }
}

fn comfy_name(kind: ComponentKind, body: &str) -> &'static str {
    match kind {
        _ if body.starts_with(T5) => "t5xxl",
        ComponentKind::TextEncoder(2) => "clip_g",
        _ => "clip_l",
    }
}

/// A few of many names, in words.
pub(super) fn some(names: &[String]) -> String {
    match names {
        [first, second, _, ..] => format!("{first}, {second} and {} more", names.len() - 2),
        names => names.join(" and "),
    }
}

/// What a format has no place for, in words.
pub(super) fn left_out(adapter: &Adapter, target: &Target) -> Vec<String> {
    let mut lost = Vec::new();
    let mut say = |what: &str, names: Vec<String>| {
        if !names.is_empty() {
            lost.push(format!("{what} ({})", some(&names)));
        }
    };
    let modules = |is: &dyn Fn(&Module) -> bool| -> Vec<String> {
        let found = adapter.modules().values().filter(|module| is(module));
        found.map(|module| module.title().into_owned()).collect()
    };
    let kind =
        |kind: LayerKind| modules(&|module| module.kind == kind && !target.has_place(module));
    say("updates of embeddings", kind(LayerKind::Embedding));
    say("updates of convolutions", kind(LayerKind::Convolution));
    say("updates of norms", kind(LayerKind::Norm));
    say("updates of biases", kind(LayerKind::Bias));
    if !target.holds.magnitude {
        say("DoRA's magnitudes", modules(&|module| module.magnitudes().is_some()));
    }
    if !target.holds.bias {
        say("biases of second factors", modules(&|module| module.bias.is_some()));
    }
    if !target.holds.whole || target.name != adapter.format() {
        let saved = adapter.saved().iter().map(|saved| saved.path.clone()).collect();
        say("parameters that were trained whole", saved);
        let rows = adapter.trained_rows().iter().map(|rows| rows.path.clone()).collect();
        say("trained rows of embeddings", rows);
    }
    lost
}

/// Metadata of the source that the format has no place for, in words.
pub(super) fn metadata_left_out(adapter: &Adapter, target: &Target) -> Vec<String> {
    let settings = adapter.settings();
    let is_metadata = settings.values().all(Value::is_string) && !settings.is_empty();
    if !is_metadata {
        return Vec::new();
    }
    let names: Vec<String> = match target.is_directory {
        true => settings.keys().filter(|key| *key != "format").cloned().collect(),
        false => write_parts::metadata_left_out(adapter, target.name).map(str::to_owned).collect(),
    };
    match names.is_empty() {
        true => Vec::new(),
        false => vec![format!("metadata of the file ({})", some(&names))],
    }
}

/// What a user would want to know of the source.
pub(super) fn notes(adapter: &Adapter, target: &Target) -> Vec<String> {
    let mut notes = Vec::new();
    let digests: Vec<_> =
        adapter.settings().keys().filter(|key| write_parts::is_digest(key)).cloned().collect();
    if !digests.is_empty() && !target.is_directory && target.name != "gguf" {
        notes.push(format!("{} was made anew, of the file that was written", some(&digests)));
    }
    if adapter.semantics().rank_stabilized && target.name != adapter.format() {
        notes.push(
            "its scale is α/√r; what was written has α/r with an alpha that gives the same".into(),
        );
    }
    notes
}
