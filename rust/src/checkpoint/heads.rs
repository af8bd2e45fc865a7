//! Task heads: the classes of transformers that end in one, by the names of their output layers and
//! by what their configs say.

use serde_json::{Map, Value};

use super::Checkpoint;

/// What a model is made for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Task {
    /// A label for each text, or a reward.
    SequenceClassification,
    /// A label for each token.
    TokenClassification,
    /// The ends of a span.
    QuestionAnswering,
    /// The next token, or that of a mask.
    Language,
}

/// How the names of classes end that are made for something else than for labels.
const OTHER_ENDINGS: [&str; 9] = [
    "ForCausalLM",
    "LMHeadModel",
    "ForConditionalGeneration",
    "ForMaskedLM",
    "ForPreTraining",
    "EncoderModel",
    "ForSeq2SeqLM",
    "WithLMHead",
    "Model",
];
/// The output layers of heads, whose rows are labels; the first that a model has counts.
const OUTPUT_LAYERS: [&str; 6] = [
    "score",
    "qa_outputs",
    "classification_head.out_proj",
    "classifier.out_proj",
    "classifier",
    "logits_proj",
];
/// The model types whose class for answers calls its backbone [`BACKBONE_OF_ANSWERS`]; all other
/// classes of theirs call it [`BACKBONE`] (`base_model_prefix` in transformers).
const WITH_BACKBONE_OF_ANSWERS: [&str; 13] = [
    "arcee",
    "diffllama",
    "exaone4",
    "llama",
    "ministral",
    "nemotron",
    "ouro",
    "qwen2",
    "qwen3",
    "qwen3_moe",
    "qwen3_next",
    "seed_oss",
    "smollm3",
];
/// What the names of a backbone begin with in most classes of those types.
pub const BACKBONE: &str = "model.";
/// What they begin with in their class for answers.
pub const BACKBONE_OF_ANSWERS: &str = "transformer.";

impl Task {
    /// How the names of its classes end; nothing for those of language models.
    pub fn ending(self) -> Option<&'static str> {
        match self {
            Self::SequenceClassification => Some("ForSequenceClassification"),
            Self::TokenClassification => Some("ForTokenClassification"),
            Self::QuestionAnswering => Some("ForQuestionAnswering"),
            Self::Language => None,
        }
    }

    /// That of the class of that name, where it has a head of labels.
    pub fn of_class(class: &str) -> Option<Self> {
        [Self::SequenceClassification, Self::TokenClassification, Self::QuestionAnswering]
            .into_iter()
            .find(|task| task.ending().is_some_and(|ending| class.ends_with(ending)))
    }

    /// The class of the same family with this task's head, by transformers' way to call them.
    pub fn class_of(self, class: &str) -> Option<String> {
        let ending = self.ending()?;
        if class.ends_with(ending) {
            return Some(class.to_owned());
        }
        let labelled = Self::of_class(class).and_then(Self::ending);
        let endings = labelled.into_iter().chain(OTHER_ENDINGS);
        let family = endings.filter_map(|ending| class.strip_suffix(ending)).next()?;
        (!family.is_empty()).then(|| format!("{family}{ending}"))
    }
}

/// The number of labels that a tensor has rows for, if it is the weight of a head's output layer, and
/// the task that the layer's name tells.
pub fn output_layer(name: &str, shape: &[u64]) -> Option<(u64, Option<Task>)> {
    let module = name.strip_suffix(".weight")?;
    let is_named = |layer: &str| {
        module.strip_suffix(layer).is_some_and(|rest| rest.is_empty() || rest.ends_with('.'))
    };
    let layer = OUTPUT_LAYERS.iter().find(|layer| is_named(layer))?;
    let task = match *layer {
        "qa_outputs" => Some(Task::QuestionAnswering),
        "classification_head.out_proj" | "logits_proj" => Some(Task::SequenceClassification),
        _ => None,
    };
    match shape {
        [labels, _] => Some((*labels, task)),
        _ => None,
    }
}

/// Whether the class for answers of a config's family calls its backbone otherwise than the others do.
pub fn renames_backbone(config: &Map<String, Value>) -> bool {
    let kind = config.get("model_type").and_then(Value::as_str);
    kind.is_some_and(|kind| WITH_BACKBONE_OF_ANSWERS.contains(&kind))
}

/// The name that such a class for answers gives to a tensor of the backbone, by that of the other
/// classes.
pub fn name_for_answers(name: &str) -> Option<String> {
    name.strip_prefix(BACKBONE).map(|rest| format!("{BACKBONE_OF_ANSWERS}{rest}"))
}

/// The class that a config names.
pub fn class_of(config: &Map<String, Value>) -> Option<&str> {
    config.get("architectures")?.as_array()?.first()?.as_str()
}

/// The number of labels of a config, as transformers counts them.
pub fn labels_of(config: &Map<String, Value>) -> u64 {
    let named = config.get("id2label").and_then(Value::as_object).map(|names| names.len() as u64);
    let counted = || config.get("num_labels").and_then(Value::as_u64);
    named.or_else(counted).unwrap_or(2)
}

/// The head of labels that a checkpoint holds: the name of its output layer's weight, and the
/// number of labels.
pub fn head_of(checkpoint: &Checkpoint) -> Option<(&str, u64)> {
    checkpoint.tensors().iter().find_map(|(name, location)| {
        let (labels, _) = output_layer(name, &checkpoint.at(*location).shape)?;
        Some((name.as_str(), labels))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn classes_of_a_family_are_told_by_their_endings() {
        let task = Task::SequenceClassification;
        for (class, other) in [
            ("LlamaForCausalLM", Some("LlamaForSequenceClassification")),
            ("GPT2LMHeadModel", Some("GPT2ForSequenceClassification")),
            ("BertModel", Some("BertForSequenceClassification")),
            ("T5EncoderModel", Some("T5ForSequenceClassification")),
            ("BertForTokenClassification", Some("BertForSequenceClassification")),
            ("LlamaForSequenceClassification", Some("LlamaForSequenceClassification")),
            ("Model", None),
            ("Odd", None),
        ] {
            assert_eq!(task.class_of(class).as_deref(), other, "{class}");
        }
        assert_eq!(Task::Language.class_of("LlamaForCausalLM"), None);
    }

    #[test]
    fn a_backbone_is_renamed_where_the_config_is_of_such_a_family() {
        let of = |kind: &str| serde_json::json!({"model_type": kind}).as_object().cloned();
        assert!(renames_backbone(&of("qwen2").unwrap()));
        assert!(!renames_backbone(&of("mistral").unwrap()));
        assert!(!renames_backbone(&Map::new()));
        let name = name_for_answers("model.layers.0.mlp.up_proj.weight");
        assert_eq!(name.as_deref(), Some("transformer.layers.0.mlp.up_proj.weight"));
        assert_eq!(name_for_answers("lm_head.weight"), None);
    }

    #[test]
    fn an_output_layer_is_told_by_its_name() {
        assert_eq!(output_layer("score.weight", &[3, 8]), Some((3, None)));
        let answers = Some((2, Some(Task::QuestionAnswering)));
        assert_eq!(output_layer("qa_outputs.weight", &[2, 8]), answers);
        assert_eq!(output_layer("classifier.out_proj.weight", &[4, 8]), Some((4, None)));
        assert_eq!(output_layer("classifier.dense.weight", &[8, 8]), None);
        assert_eq!(output_layer("my_classifier.weight", &[8, 8]), None);
        assert_eq!(output_layer("score.bias", &[3]), None);
    }
}
