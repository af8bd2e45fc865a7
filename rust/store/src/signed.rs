//! Signed URLs of web servers: what follows the `?` goes along with every request, and into no message.

use async_trait::async_trait;
use object_store::ClientOptions;
use object_store::client::{
    HttpClient, HttpConnector, HttpError, HttpErrorKind, HttpRequest, HttpResponse, HttpService,
    ReqwestConnector,
};

/// Makes clients that sign what they ask for.
pub(crate) struct Signed {
    query: String,
}

impl Signed {
    pub fn new(query: &str) -> Self {
        Self { query: query.to_owned() }
    }
}

impl std::fmt::Debug for Signed {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.write_str("Signed")
    }
}

impl HttpConnector for Signed {
    fn connect(&self, options: &ClientOptions) -> object_store::Result<HttpClient> {
        let client = ReqwestConnector::default().connect(options)?;
        Ok(HttpClient::new(SigningClient { client, query: self.query.clone() }))
    }
}

struct SigningClient {
    client: HttpClient,
    query: String,
}

impl std::fmt::Debug for SigningClient {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.write_str("SigningClient")
    }
}

/// What is wrong with a URL, without the URL.
#[derive(Debug)]
struct Unusable;

impl std::fmt::Display for Unusable {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.write_str("what follows the ? of the URL cannot be sent")
    }
}

impl std::error::Error for Unusable {}

#[async_trait]
impl HttpService for SigningClient {
    async fn call(&self, mut request: HttpRequest) -> Result<HttpResponse, HttpError> {
        let own = request.uri().to_string();
        let separator = if own.contains('?') { '&' } else { '?' };
        let signed = format!("{own}{separator}{}", self.query);
        *request.uri_mut() =
            signed.parse().map_err(|_| HttpError::new(HttpErrorKind::Request, Unusable))?;
        self.client.execute(request).await
    }
}
