package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/protobuf/proto"

	pb "pagewire.dev/gen/pagewire/v1"
)

// Output that takes far longer than anything here waits for.
const endless = 1000

// A request for `tokens` greedy tokens: past any end token, so that the stream is as long as it is meant to be.
func (c *client) request(tokens uint32) *pb.GenerateRequest {
	return &pb.GenerateRequest{
		Prompt: &pb.GenerateRequest_Text{Text: c.prompt},
		Sampling: &pb.SamplingParams{
			Temperature: proto.Float32(0),
			MaxTokens:   proto.Uint32(tokens),
			IgnoreEos:   proto.Bool(true),
		},
	}
}

// A stream is deltas, and then its end with the usage.
func (c *client) stream(ctx context.Context) (string, error) {
	const tokens = 24
	call, err := c.inference.Generate(ctx, c.request(tokens))
	if err != nil {
		return "", err
	}
	header, err := call.Header() // waits for the server's first word
	if err != nil {
		return "", err
	}
	text, count, messages := "", 0, 0
	var end *pb.GenerateFinished
	for {
		response, err := call.Recv()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return "", err
		}
		messages++
		switch part := response.GetResponse().(type) {
		case *pb.GenerateResponse_Delta:
			text += part.Delta.GetText()
			count += len(part.Delta.GetTokenIds())
		case *pb.GenerateResponse_Finished:
			end = part.Finished
		}
	}
	if end.GetFinishReason() != pb.FinishReason_FINISH_REASON_LENGTH || count != tokens {
		return "", fmt.Errorf("%d tokens came of %d, and the end %v", count, tokens, end)
	}
	return fmt.Sprintf("%d tokens in %d messages, request %s: %q", count, messages, first(header, "request-id"), text), nil
}

// Leaving a call tells the server, which frees everything the request held.
func (c *client) cancel(ctx context.Context) (string, error) {
	ctx, leave := context.WithCancel(ctx)
	defer leave()
	call, err := c.inference.Generate(ctx, c.request(endless))
	if err != nil {
		return "", err
	}
	for range 3 {
		if _, err := call.Recv(); err != nil {
			return "", err
		}
	}
	leave()
	r, err := expect(codes.Canceled, drain(call))
	return "left after 3 messages: " + r.code.String(), err
}

// Any client can end a request by its id, and its stream closes with CANCELLED.
func (c *client) cancelByID(ctx context.Context) (string, error) {
	call, err := c.inference.Generate(ctx, c.request(endless))
	if err != nil {
		return "", err
	}
	if _, err := call.Recv(); err != nil {
		return "", err
	}
	header, err := call.Header()
	if err != nil {
		return "", err
	}
	named := &pb.CancelGenerationRequest{RequestId: first(header, "request-id")}
	if _, err := c.inference.CancelGeneration(ctx, named); err != nil {
		return "", err
	}
	r, err := expect(codes.Canceled, drain(call))
	return r.String(), err
}

// A deadline goes to the server with the call: it ends the request by itself, even if the client is gone.
func (c *client) deadline(ctx context.Context) (string, error) {
	const limit = 300 * time.Millisecond
	ctx, stop := context.WithTimeout(ctx, limit)
	defer stop()
	call, err := c.inference.Generate(ctx, c.request(endless))
	if err == nil {
		err = drain(call)
	}
	r, err := expect(codes.DeadlineExceeded, err)
	return fmt.Sprintf("%s (limit %v)", r, limit), err
}

// A request that is wrong in two fields is told both.
func (c *client) badRequest(ctx context.Context) (string, error) {
	request := c.request(8)
	request.Sampling.Temperature = proto.Float32(-1)
	request.Sampling.TopP = proto.Float32(1.5)
	call, err := c.inference.Generate(ctx, request)
	if err == nil {
		err = drain(call)
	}
	r, err := expect(codes.InvalidArgument, err)
	if err == nil && len(r.violations) != 2 {
		err = fmt.Errorf("not two violations: %v", r.violations)
	}
	return r.String(), err
}

// A running request's id is taken; the reason is a word that a program can rely on.
func (c *client) sameID(ctx context.Context) (string, error) {
	ctx, leave := context.WithCancel(ctx)
	defer leave()
	request := c.request(endless)
	request.RequestId = fmt.Sprintf("go-%d", time.Now().UnixNano())
	running, err := c.inference.Generate(ctx, request)
	if err != nil {
		return "", err
	}
	if _, err := running.Recv(); err != nil {
		return "", err
	}
	second, err := c.inference.Generate(ctx, request)
	if err == nil {
		err = drain(second)
	}
	r, err := expect(codes.AlreadyExists, err)
	if err == nil && r.reason != "REQUEST_ID_IN_USE" {
		err = fmt.Errorf("the reason is %q", r.reason)
	}
	return r.String(), err
}

// Whoever finds the queue full is told when to come back. The first refusal ends the other streams.
func (c *client) overloaded(ctx context.Context) (string, error) {
	if c.overload == 0 {
		return "-overload N offers N streams at once", errSkipped
	}
	ctx, leave := context.WithCancel(ctx)
	defer leave()
	ends := make(chan error, c.overload)
	for range c.overload {
		go func() {
			call, err := c.inference.Generate(ctx, c.request(endless))
			if err == nil {
				err = drain(call)
			}
			ends <- err
		}()
	}
	r, err := expect(codes.ResourceExhausted, <-ends)
	if err == nil && r.retryAfter <= 0 {
		err = errors.New("it was refused, and not told when to come back")
	}
	return r.String(), err
}

// Reads a stream to its end; nil where it ended well.
func drain(call interface {
	Recv() (*pb.GenerateResponse, error)
}) error {
	for {
		if _, err := call.Recv(); err != nil {
			if errors.Is(err, io.EOF) {
				return nil
			}
			return err
		}
	}
}

func first(header metadata.MD, key string) string {
	if values := header.Get(key); len(values) > 0 {
		return values[0]
	}
	return ""
}
