FROM golang:1.26 AS build
WORKDIR /src
COPY go.mod go.sum ./
RUN go mod download
COPY . .
ARG VERSION=unknown
RUN CGO_ENABLED=0 go build -trimpath -ldflags="-s -w -X main.release=$VERSION" -o /auth-service .

FROM scratch
COPY --from=build /etc/ssl/certs/ca-certificates.crt /etc/ssl/certs/
COPY --from=build /auth-service /auth-service
USER 65532:65532
# Probes come from outside the container. Publish the first port only.
ENV MANAGEMENT_ADDR=:9090
EXPOSE 3000 9090
HEALTHCHECK --interval=10s --timeout=4s --start-period=5s CMD ["/auth-service", "healthcheck"]
ENTRYPOINT ["/auth-service"]
